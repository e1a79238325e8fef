//! A drone's list of backends, as its session takes it: page by page, then what follows from all of them.

use super::End;
use super::jobs::{PageError, Paged};
use super::run::{Session, damaged};
use holdfast_wire::drone::{
    BackendsPage, CLOSE_BAD_MESSAGE, CLOSE_GO_ELSEWHERE, CLOSE_NAME_TAKEN, MessageToDrone,
};
use holdfast_wire::limits::{BACKENDS_LISTED_MAX, BACKENDS_PER_PAGE_MAX};

/// Pages of a drone's list that wait. A drone sends one at a time; one that does not wait fills all its pages.
const PAGES_QUEUED_MAX: usize = BACKENDS_LISTED_MAX / BACKENDS_PER_PAGE_MAX;

impl Session {
    /// A page of the drone's list. One that comes before the page before it was acknowledged waits.
    pub(super) fn page(&mut self, page: BackendsPage) -> Result<(), End> {
        let bad = |reason: String| Err(End::close(CLOSE_BAD_MESSAGE, reason));
        if self.list_ended {
            return bad("a page of the list of backends came after the last one".to_owned());
        }
        self.listed += page.backends.len();
        if self.listed > BACKENDS_LISTED_MAX || self.pages.len() >= PAGES_QUEUED_MAX {
            return bad(format!(
                "the list has {} backends so far, of which {} pages wait; at most {BACKENDS_LISTED_MAX} backends and \
                 {PAGES_QUEUED_MAX} pages are allowed",
                self.listed,
                self.pages.len()
            ));
        }
        self.list_ended = page.last;
        self.pages.push_back(page);
        Ok(())
    }

    pub(super) fn paged(&mut self, paged: Result<Paged, PageError>) -> Result<(), End> {
        match paged {
            Ok(Paged::More(listing)) => self.listing = Some(*listing),
            Ok(Paged::Complete(not_held)) => {
                self.is_listed = true;
                if !not_held.is_empty() {
                    tracing::warn!(
                        drone_id = self.drone_id,
                        count = not_held.len(),
                        "listed backends hold no key"
                    );
                }
                self.ends.extend(not_held);
                self.more_actions = true;
            }
            Err(PageError::State(error)) => return Err(damaged(error)),
            Err(PageError::OtherSession) => {
                return Err(End::close(CLOSE_NAME_TAKEN, "a newer session of this drone has taken over"));
            }
            // The drone does not send its list again on this session.
            Err(PageError::Unexpected(outcome)) => return Err(self.unexpected(&outcome)),
            Err(PageError::Propose(error)) => return Err(End::close(CLOSE_GO_ELSEWHERE, error.to_string())),
        }
        self.send(&MessageToDrone::AckBackends {})
    }
}
