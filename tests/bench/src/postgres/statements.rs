//! What Plane 0.5.6 asks the database when a key is acquired and when it is renewed, in our own words: the same rows read
//! and written, in the same order, in the same transactions.

use crate::problem::{During, Result, problem};
use tokio_postgres::{Client, NoTls, Statement};

/// Who holds the key, if anybody.
const LOOK: &str = "
    SELECT k.id, k.tag, k.expires_at > now(), k.fencing_token, b.last_status, b.cluster, b.subdomain, b.static_token
    FROM backend_key k LEFT JOIN backend b ON b.id = k.id
    WHERE k.key_name = $1 AND k.namespace = ''";
/// Two random drones that could take it, with how many backends each has.
const DRONES: &str = "
    SELECT d.id, n.name, (d.last_local_time)::text,
        (SELECT count(*) FROM backend b WHERE b.drone_id = n.id AND b.last_status <> 'terminated')
    FROM node n LEFT JOIN drone d ON d.id = n.id LEFT JOIN controller c ON c.id = n.controller
    WHERE d.ready AND NOT d.draining AND c.id IS NOT NULL AND c.is_online AND n.cluster = $1
        AND now() - d.last_heartbeat < interval '45 seconds' AND now() - c.last_heartbeat < interval '45 seconds'
        AND d.last_local_time IS NOT NULL AND d.pool = ''
    ORDER BY random() LIMIT 2";
/// Backend and key in one statement; the unique index on the key refuses a second holder.
const TAKE: &str = "
    WITH made AS (
        INSERT INTO backend (id, cluster, last_status, last_status_time, last_status_number, drone_id, expiration_time,
            allowed_idle_seconds, last_keepalive, state, static_token, subdomain)
        VALUES ($1, $2, 'scheduled', now(), 0, $3, NULL, NULL, now(), '{\"status\": \"scheduled\"}', NULL, NULL)
        RETURNING id
    )
    INSERT INTO backend_key (id, key_name, namespace, tag, expires_at, fencing_token)
    SELECT $1, $4, '', '', now() + interval '60 seconds', extract(epoch FROM now()) * 1000 FROM made
    RETURNING fencing_token";
/// History of a backend.
const STATE: &str =
    "INSERT INTO backend_state (backend_id, state) VALUES ($1, '{\"status\": \"scheduled\"}')";
/// An event for whoever listens: stored and notified.
const EVENT: &str = "
    WITH stored AS (
        INSERT INTO event (kind, key, created_at, data) VALUES ($1, $2, now(), $3::text::jsonb) RETURNING id
    )
    SELECT pg_notify('plane_events', json_build_object('payload', $3::text::jsonb, 'timestamp', now(), 'id', id,
        'kind', $1::text, 'key', $2::text)::text) FROM stored";
/// What the drone is to do.
const ACTION: &str =
    "INSERT INTO backend_action (id, action, drone_id, backend_id) VALUES ($1, $2::text::jsonb, $3, $4)";
/// What the caller connects with, in a transaction of its own.
const TOKEN: &str = "
    INSERT INTO token (token, backend_id, username, auth, secret_token, expiration_time)
    VALUES ($1, $2, NULL, '{}', $3, now() + interval '3600 seconds')";
/// One renewal.
const RENEW: &str =
    "UPDATE backend_key SET expires_at = now() + interval '60 seconds' WHERE id = $1 AND allow_renew";

/// Cluster of all rows.
pub const CLUSTER: &str = "test.local:9090";

/// A connection with its statements prepared, as sqlx keeps them.
pub struct Connection {
    client: Client,
    look: Statement,
    drones: Statement,
    take: Statement,
    state: Statement,
    event: Statement,
    action: Statement,
    token: Statement,
    renew: Statement,
}

/// Connects to one database of one server.
pub async fn connect(settings: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(settings, NoTls).await.during("PostgreSQL")?;
    // Its error reaches whoever waits for an answer.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

impl Connection {
    /// Connects and prepares.
    pub async fn open(settings: &str) -> Result<Self> {
        let client = connect(settings).await?;
        let prepare = async |text: &str| client.prepare(text).await.during(text);
        Ok(Self {
            look: prepare(LOOK).await?,
            drones: prepare(DRONES).await?,
            take: prepare(TAKE).await?,
            state: prepare(STATE).await?,
            event: prepare(EVENT).await?,
            action: prepare(ACTION).await?,
            token: prepare(TOKEN).await?,
            renew: prepare(RENEW).await?,
            client,
        })
    }

    /// Acquires a free key for a new backend; held is an error.
    pub async fn acquire(&self, key: &str, backend: &str) -> Result<()> {
        let sql = "a statement of acquiring";
        if self.client.query_opt(&self.look, &[&key]).await.during(sql)?.is_some() {
            return problem(format!("{key} was held"));
        }
        let drones = self.client.query(&self.drones, &[&CLUSTER]).await.during(sql)?;
        let fewest = drones.iter().min_by_key(|row| row.get::<_, i64>(3)).during("no drone")?;
        let (drone, local_time): (i32, String) = (fewest.get(0), fewest.get(2));

        self.client.batch_execute("BEGIN").await.during(sql)?;
        let taken =
            self.client.query_one(&self.take, &[&backend, &CLUSTER, &drone, &key]).await.during(sql)?;
        let fencing_token: i64 = taken.get(0);
        self.client.execute(&self.state, &[&backend]).await.during(sql)?;
        let state = r#"{"status":"scheduled"}"#;
        self.client.query(&self.event, &[&"backend_state", &backend, &state]).await.during(sql)?;
        let action_id = format!("ak-{backend}");
        let action = format!(
            r#"{{"action_id":"{action_id}","backend_id":"{backend}","drone_id":{drone},"action":{{"Spawn":{{"executable":{{"command":["true"]}},"key":{{"key":{{"name":"{key}","namespace":"","tag":""}},"deadlines":{{"renew_at":"{local_time}","soft_terminate_at":"{local_time}","hard_terminate_at":"{local_time}"}},"token":{fencing_token}}},"static_token":null}}}}}}"#
        );
        let drone_key = drone.to_string();
        self.client.query(&self.event, &[&"backend_action", &drone_key, &action]).await.during(sql)?;
        self.client.execute(&self.action, &[&action_id, &action, &drone, &backend]).await.during(sql)?;
        self.client.batch_execute("COMMIT").await.during(sql)?;

        // Random in Plane; unique here, which costs the index the same.
        let (token, secret) =
            (format!("to-{backend}-0123456789abcdef"), format!("se-{backend}-0123456789abcdef"));
        self.client.execute(&self.token, &[&token, &backend, &secret]).await.during(sql)?;
        Ok(())
    }

    /// Renews the key of one backend.
    pub async fn renew(&self, backend: &str) -> Result<()> {
        match self.client.execute(&self.renew, &[&backend]).await.during("a renewal")? {
            1 => Ok(()),
            rows => problem(format!("the renewal of {backend} changed {rows} rows")),
        }
    }
}
