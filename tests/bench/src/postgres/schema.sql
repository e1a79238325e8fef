-- The tables, keys and indexes that Plane 0.5.6 keeps in PostgreSQL for acquiring and renewing a key, written anew from
-- its migrations: same columns, types, foreign keys and indexes, because they are what a statement costs.

CREATE TABLE controller (
    id varchar(255) PRIMARY KEY,
    first_seen timestamptz NOT NULL DEFAULT now(),
    last_heartbeat timestamptz NOT NULL,
    is_online boolean NOT NULL,
    plane_version varchar(255) NOT NULL,
    plane_hash varchar(255) NOT NULL,
    ip inet
);

CREATE TABLE node (
    id serial PRIMARY KEY,
    kind varchar(255) NOT NULL,
    name varchar(255) NOT NULL,
    cluster varchar(255),
    plane_version varchar(255) NOT NULL,
    plane_hash varchar(255) NOT NULL,
    controller varchar(255) REFERENCES controller (id),
    ip inet NOT NULL,
    last_connection_start_time timestamptz
);
CREATE UNIQUE INDEX ON node (cluster, name);

CREATE TABLE drone (
    id integer PRIMARY KEY REFERENCES node (id),
    ready boolean NOT NULL,
    draining boolean NOT NULL DEFAULT false,
    last_heartbeat timestamptz,
    last_local_time timestamptz,
    pool varchar(255) NOT NULL DEFAULT ''
);
CREATE INDEX ON drone (last_heartbeat);

CREATE TABLE backend (
    id varchar(255) PRIMARY KEY,
    cluster varchar(255) NOT NULL,
    last_status varchar(255) NOT NULL,
    last_status_time timestamptz NOT NULL,
    cluster_address varchar(255),
    drone_id integer NOT NULL REFERENCES node (id),
    expiration_time timestamptz,
    last_keepalive timestamptz NOT NULL,
    allowed_idle_seconds integer,
    state jsonb NOT NULL,
    static_token varchar(256),
    subdomain varchar(255),
    last_status_number integer
);
CREATE INDEX ON backend (drone_id) WHERE last_status <> 'terminated';
CREATE INDEX ON backend (static_token);

CREATE TABLE backend_key (
    id varchar(255) PRIMARY KEY REFERENCES backend (id),
    namespace varchar(255) NOT NULL,
    key_name varchar(255) NOT NULL,
    tag varchar(255) NOT NULL,
    expires_at timestamptz NOT NULL,
    fencing_token bigint NOT NULL,
    allow_renew boolean NOT NULL DEFAULT true
);
CREATE UNIQUE INDEX ON backend_key (namespace, key_name);

CREATE TABLE backend_state (
    id serial PRIMARY KEY,
    backend_id varchar(255) NOT NULL REFERENCES backend (id),
    state jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON backend_state (backend_id, created_at);

CREATE TABLE backend_action (
    id varchar(255) PRIMARY KEY,
    backend_id varchar(255) REFERENCES backend (id),
    drone_id integer NOT NULL REFERENCES node (id),
    action jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    acked_at timestamptz
);
CREATE INDEX ON backend_action (backend_id);
CREATE INDEX ON backend_action (created_at);
CREATE INDEX ON backend_action (drone_id, created_at) WHERE acked_at IS NULL;

CREATE TABLE event (
    id serial PRIMARY KEY,
    kind varchar(255) NOT NULL,
    key varchar(255),
    created_at timestamptz NOT NULL DEFAULT now(),
    data jsonb NOT NULL
);
CREATE INDEX ON event (created_at);

CREATE TABLE token (
    token varchar(255) PRIMARY KEY,
    backend_id varchar(255) NOT NULL REFERENCES backend (id),
    expiration_time timestamptz NOT NULL,
    username varchar(255),
    auth jsonb NOT NULL,
    secret_token varchar(255) NOT NULL
);
