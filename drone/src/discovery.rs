//! Which controller to connect to.

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_wire::http::{ClusterInfo, LEADER_HEADER, MEMBERS_HEADER};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tracing::debug;

/// Most controllers that are remembered.
pub const CONTROLLERS_MAX: usize = 32;
/// A controller that could not be used is asked last for this long.
const AVOID: Duration = Duration::from_secs(5);
/// Longest wait for a controller's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for the others once one has answered without naming a usable leader.
const STRAGGLER_TIMEOUT: Duration = Duration::from_millis(150);

/// Checks a controller's URL and takes off what follows the host and port. Only `http` is spoken so far.
pub fn base_url(text: &str) -> Result<String, String> {
    let text = text.trim();
    let rest = text.strip_prefix("http://").ok_or_else(|| format!("{text:?} must begin with http://"))?;
    let host = rest.trim_end_matches('/');
    if host.is_empty() || host.contains(['/', '?', '#', '@']) || host.chars().any(char::is_whitespace) {
        return Err(format!("{text:?} must be http://HOST:PORT"));
    }
    let url = format!("http://{host}");
    match reqwest::Url::parse(&url) {
        Ok(_) => Ok(url),
        Err(e) => Err(format!("{text:?} is not a URL: {e}")),
    }
}

/// What is known of the controllers.
#[derive(Debug)]
pub struct Discovery {
    http: reqwest::Client,
    /// As given at start.
    configured: Vec<String>,
    /// The latest that was named as leader.
    leader: Option<String>,
    avoided: BTreeMap<String, Instant>,
    /// The members as a controller told them, and the number of that membership: when those of the configuration are
    /// gone, this is how others are found.
    members: Mutex<(u64, Vec<String>)>,
}

impl Discovery {
    /// Knows these controllers, checked by [`base_url`].
    pub fn new(mut configured: Vec<String>) -> Result<Self, reqwest::Error> {
        configured.truncate(CONTROLLERS_MAX);
        let http = reqwest::Client::builder()
            .timeout(ANSWER_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self { http, configured, leader: None, avoided: BTreeMap::new(), members: Mutex::default() })
    }

    /// A controller that could not be used: others first, for a while.
    pub fn avoid(&mut self, url: &str) {
        let now = Instant::now();
        self.avoided.retain(|_, until| *until > now);
        if self.avoided.len() < CONTROLLERS_MAX {
            self.avoided.insert(url.to_owned(), now + AVOID);
        }
    }

    fn is_avoided(&self, url: &str) -> bool {
        self.avoided.get(url).is_some_and(|until| *until > Instant::now())
    }

    /// Controllers to try, best first: the leader, then those that answer. Empty if none answers.
    pub async fn candidates(&mut self) -> Vec<String> {
        let known = &*self;
        let all: BTreeSet<String> = known.leader.iter().cloned().chain(known.everyone()).collect();
        let mut answers: FuturesUnordered<_> =
            all.into_iter().map(|url| async move { (url.clone(), known.ask(&url).await) }).collect();
        let mut answering = Vec::new();
        let mut leader = None;
        let mut end = Instant::now() + ANSWER_TIMEOUT;
        while let Ok(Some((url, answer))) = tokio::time::timeout_at(end, answers.next()).await {
            let Some(named) = answer else { continue };
            let speaks_for_itself = named.as_ref() == Some(&url);
            answering.push(url);
            if let Some(named) = named
                && !known.is_avoided(&named)
            {
                leader = Some(named);
                // A follower may not have noticed its leader's death; the leader itself knows best.
                if speaks_for_itself {
                    break;
                }
            }
            end = end.min(Instant::now() + STRAGGLER_TIMEOUT);
        }
        drop(answers);
        let mut candidates: Vec<String> = leader.iter().cloned().collect();
        candidates.extend(answering.into_iter().filter(|url| Some(url) != leader.as_ref()));
        // Stable: the rest keeps its order.
        candidates.sort_by_key(|url| self.is_avoided(url));
        if leader.is_some() {
            self.leader = leader;
        }
        candidates
    }

    /// Asks a controller who leads; none if it does not answer, `Some(None)` if it does not know.
    pub async fn ask(&self, url: &str) -> Option<Option<String>> {
        match self.http.get(format!("{url}/pub/health")).send().await {
            Ok(answer) => {
                let text = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
                if let Some(version) = text(MEMBERS_HEADER).and_then(|text| text.parse().ok()) {
                    self.learn_members(url, version).await;
                }
                let named = text(LEADER_HEADER);
                Some(named.and_then(|named| base_url(named).ok()))
            }
            Err(e) => {
                debug!(controller = url, "does not answer: {e}");
                None
            }
        }
    }

    /// All controllers that are known.
    fn everyone(&self) -> Vec<String> {
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let learned = members.1.iter().filter(|url| !self.configured.contains(url));
        self.configured.iter().chain(learned).cloned().collect()
    }

    /// Asks for the members if that number is news.
    async fn learn_members(&self, url: &str, version: u64) {
        if version <= self.members.lock().unwrap_or_else(PoisonError::into_inner).0 {
            return;
        }
        let answer = self.http.get(format!("{url}/ctrl/cluster?consistency=local")).send().await;
        let Ok(answer) = answer else { return };
        let Ok(info) = answer.json::<ClusterInfo>().await else { return };
        let urls: Vec<String> = info
            .members
            .iter()
            .filter_map(|member| base_url(member.url.as_deref()?).ok())
            .take(CONTROLLERS_MAX)
            .collect();
        if urls.is_empty() {
            return;
        }
        // One whose URL is not known yet is asked for again.
        let version = if urls.len() == info.members.len() { version } else { 0 };
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        if version == 0 || version > members.0 {
            *members = (version.max(members.0), urls);
        }
    }

    /// The leader's URL, if it is another than this one, names itself, and answers.
    pub async fn better_than(&self, url: &str) -> Option<String> {
        let named = self.ask(url).await??;
        if named == url || self.is_avoided(&named) {
            return None;
        }
        // Its own word: a follower's may be old.
        (self.ask(&named).await?? == named).then_some(named)
    }

    /// Remembers a leader.
    pub fn set_leader(&mut self, url: String) {
        self.leader = Some(url);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_cut_to_host_and_port() {
        assert_eq!(base_url(" http://127.0.0.1:7101/ "), Ok("http://127.0.0.1:7101".to_owned()));
        assert_eq!(base_url("http://[::1]:1"), Ok("http://[::1]:1".to_owned()));
        for bad in
            ["", "127.0.0.1:7101", "https://a", "http://", "http://a/b", "http://a:99999", "http://a b"]
        {
            assert!(base_url(bad).is_err(), "{bad}");
        }
    }
}
