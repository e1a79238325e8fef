//! Which controllers there are, and which of them to ask first. No IO in here.

use crate::error::ClientError;
use std::collections::HashMap;

/// Most controllers that can be named.
pub const URLS_MAX: usize = 64;
/// Most further URLs learned from `x-holdfast-leader`; the oldest makes room.
const LEARNED_URLS_MAX: usize = 16;
/// How long after one question for the members the next may be asked, in milliseconds.
const MEMBERS_AGAIN_MS: u64 = 500;
/// How long a controller that could not be connected to is asked last, in milliseconds. Without it, an advertised URL
/// that only the controllers can reach would cost every request a failed attempt.
const AVOID_MS: u64 = 5_000;

/// The controllers, in the order in which to ask them.
#[derive(Debug)]
pub(crate) struct Targets {
    /// As configured; never empty.
    configured: Vec<String>,
    /// Leaders that the configuration doesn't name.
    learned: Vec<String>,
    /// Who led when last heard.
    leader: Option<String>,
    /// The members' URLs as a controller told them: how the client finds its way when those of its configuration are gone.
    members: Vec<String>,
    /// Number of the membership that `members` is of.
    members_version: u64,
    /// Not before this is another controller asked for the members.
    members_not_before_ms: u64,
    /// Who could not be connected to, and until when others come first.
    avoided: HashMap<String, u64>,
    /// Index into `configured` of the one to ask when no leader is known.
    cursor: usize,
}

/// Checks a controller URL and brings it to the form in which it is compared: with a scheme, without a trailing slash.
pub fn normal_url(url: &str) -> Result<String, ClientError> {
    let bad = |problem: String| Err(ClientError::BadUrl { url: url.to_owned(), problem });
    let trimmed = url.trim();
    if trimmed.is_empty() {
        return bad("is empty".to_owned());
    }
    let full = if trimmed.contains("://") { trimmed.to_owned() } else { format!("http://{trimmed}") };
    match reqwest::Url::parse(&full) {
        Err(error) => bad(format!("is not a URL: {error}")),
        Ok(parsed) if parsed.scheme() != "http" => {
            bad(format!("has scheme {:?}; http is needed", parsed.scheme()))
        }
        Ok(parsed) if parsed.host_str().is_none_or(str::is_empty) => bad("has no host".to_owned()),
        Ok(parsed) if parsed.query().is_some() || parsed.fragment().is_some() => {
            bad("must not have a query or fragment".to_owned())
        }
        Ok(_) => Ok(full.trim_end_matches('/').to_owned()),
    }
}

impl Targets {
    pub(crate) fn new(urls: Vec<String>) -> Result<Self, ClientError> {
        let mut configured: Vec<String> = Vec::new();
        for url in &urls {
            let url = normal_url(url)?;
            if !configured.contains(&url) {
                configured.push(url);
            }
        }
        let problem = if configured.is_empty() {
            "is missing; at least one is needed".to_owned()
        } else if configured.len() > URLS_MAX {
            format!("is one of {}; at most {URLS_MAX} are allowed", configured.len())
        } else {
            return Ok(Self {
                configured,
                learned: Vec::new(),
                leader: None,
                members: Vec::new(),
                members_version: 0,
                members_not_before_ms: 0,
                avoided: HashMap::new(),
                cursor: 0,
            });
        };
        Err(ClientError::BadUrl { url: urls.first().cloned().unwrap_or_default(), problem })
    }

    /// Everyone, in the order in which to ask: the leader, the configured ones from the cursor on, the members, the learned
    /// ones; those that could not be connected to lately come last.
    pub(crate) fn order(&self, now_ms: u64) -> Vec<String> {
        let mut order: Vec<String> =
            Vec::with_capacity(self.configured.len() + self.members.len() + self.learned.len());
        let is_avoided = |url: &String| self.avoided.get(url).is_some_and(|until_ms| now_ms < *until_ms);
        if let Some(leader) = &self.leader
            && !is_avoided(leader)
        {
            order.push(leader.clone());
        }
        let (before, from) = self.configured.split_at(self.cursor);
        for url in from.iter().chain(before).chain(&self.members).chain(&self.learned) {
            if !order.contains(url) {
                order.push(url.clone());
            }
        }
        // Stable: otherwise the order stays.
        order.sort_by_key(is_avoided);
        order
    }

    /// An answer named this number of the membership: whether to ask now for the members. If so, others don't for a while.
    pub(crate) fn wants_members(&mut self, version: u64, now_ms: u64) -> bool {
        let wanted = version > self.members_version && now_ms >= self.members_not_before_ms;
        if wanted {
            self.members_not_before_ms = now_ms.saturating_add(MEMBERS_AGAIN_MS);
        }
        wanted
    }

    /// The members of that number, as far as their URLs are known; `complete` if all are.
    pub(crate) fn set_members(&mut self, version: u64, urls: &[String], complete: bool) {
        if version < self.members_version || urls.is_empty() {
            return;
        }
        self.members = urls.iter().filter_map(|url| normal_url(url).ok()).take(URLS_MAX).collect();
        if complete {
            self.members_version = version;
            let members = &self.members;
            self.learned.retain(|url| members.contains(url));
        }
    }

    /// Takes in an answer of `url`. `leader` is the value of its leader header, if it had one.
    pub(crate) fn answered(&mut self, url: &str, leader: Option<&str>) {
        if let Some(index) = self.configured.iter().position(|u| u == url) {
            self.cursor = index;
        }
        self.avoided.remove(url);
        // A leader header that is no usable URL is no reason to fail a request that was answered.
        let Some(leader) = leader.and_then(|l| normal_url(l).ok()) else { return };
        if !self.configured.contains(&leader) && !self.learned.contains(&leader) {
            if self.learned.len() == LEARNED_URLS_MAX {
                self.learned.remove(0);
            }
            self.learned.push(leader.clone());
        }
        self.leader = Some(leader);
    }

    /// Takes in that `url` could not be connected to, or was lost in the middle of a request.
    pub(crate) fn failed(&mut self, url: &str, now_ms: u64) {
        if self.leader.as_deref() == Some(url) {
            self.leader = None;
        }
        self.avoided.retain(|_, until_ms| now_ms < *until_ms);
        self.avoided.insert(url.to_owned(), now_ms.saturating_add(AVOID_MS));
        if self.configured.get(self.cursor).is_some_and(|u| u == url) {
            self.cursor = (self.cursor + 1) % self.configured.len();
        }
    }

    /// Takes in that `url` knows no leader.
    pub(crate) fn leaderless(&mut self, url: &str) {
        if self.leader.as_deref() == Some(url) {
            self.leader = None;
        }
        if self.configured.get(self.cursor).is_some_and(|u| u == url) {
            self.cursor = (self.cursor + 1) % self.configured.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Targets {
        Targets::new(vec!["http://a:1/".into(), "b:2".into(), "http://c:3".into()]).unwrap()
    }

    #[test]
    fn the_leader_comes_first_once_known() {
        let mut targets = three();
        assert_eq!(targets.order(0), ["http://a:1", "http://b:2", "http://c:3"]);
        targets.answered("http://a:1", Some("http://c:3/"));
        assert_eq!(targets.order(0), ["http://c:3", "http://a:1", "http://b:2"]);
    }

    #[test]
    fn a_failed_leader_is_forgotten_and_not_preferred_for_a_while() {
        let mut targets = three();
        targets.answered("http://a:1", Some("http://c:3"));
        targets.failed("http://c:3", 1_000);
        assert_eq!(targets.order(1_000)[0], "http://a:1");
        // A follower that has not noticed yet names it again.
        targets.answered("http://a:1", Some("http://c:3"));
        assert_eq!(targets.order(1_000 + AVOID_MS - 1)[0], "http://a:1");
        assert_eq!(targets.order(1_000 + AVOID_MS)[0], "http://c:3");
    }

    #[test]
    fn a_controller_without_a_leader_is_not_asked_first_again() {
        let mut targets = three();
        targets.answered("http://a:1", Some("http://a:1"));
        targets.leaderless("http://a:1");
        assert_eq!(targets.order(0), ["http://b:2", "http://c:3", "http://a:1"]);
    }

    #[test]
    fn leaders_outside_the_configuration_are_learned_up_to_a_bound() {
        let mut targets = three();
        for n in 0..LEARNED_URLS_MAX + 3 {
            targets.answered("http://a:1", Some(&format!("http://new:{n}")));
        }
        assert_eq!(targets.order(0).len(), 3 + LEARNED_URLS_MAX);
        assert_eq!(targets.order(0)[0], format!("http://new:{}", LEARNED_URLS_MAX + 2));
        targets.answered("http://a:1", Some("not a url"));
        assert_eq!(targets.order(0).len(), 3 + LEARNED_URLS_MAX);
    }

    #[test]
    fn members_are_found_when_all_that_was_configured_is_gone() {
        let mut targets = three();
        assert!(targets.wants_members(7, 0));
        assert!(!targets.wants_members(7, MEMBERS_AGAIN_MS - 1), "somebody asks already");
        targets.set_members(7, &["http://d:4/".into(), "http://c:3".into(), "no url".into()], true);
        assert!(!targets.wants_members(7, 10_000) && targets.wants_members(8, 10_000));
        for gone in ["http://a:1", "http://b:2", "http://c:3"] {
            targets.failed(gone, 1_000);
        }
        assert_eq!(targets.order(1_000)[0], "http://d:4");
        assert_eq!(targets.order(1_000).len(), 4);
        // An older list, or one of nobody, changes nothing.
        targets.set_members(6, &["http://e:5".into()], true);
        targets.set_members(9, &[], true);
        assert_eq!(targets.order(1_000)[0], "http://d:4");
        // One that is not complete is used, and asked for again.
        targets.set_members(9, &["http://f:6".into()], false);
        assert!(targets.order(1_000).contains(&"http://f:6".to_owned()));
        assert!(targets.wants_members(9, 20_000));
    }

    #[test]
    fn useless_urls_are_refused_by_name() {
        for bad in ["", "  ", "https://a", "ftp://a", "http://", "http://a?x=1", "http://a b"] {
            assert!(
                matches!(Targets::new(vec![bad.into()]), Err(ClientError::BadUrl { url, .. }) if url == bad),
                "{bad:?}"
            );
        }
        assert!(Targets::new(Vec::new()).is_err());
        assert!(Targets::new((0..URLS_MAX + 1).map(|n| format!("h:{n}")).collect()).is_err());
    }
}
