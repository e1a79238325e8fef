//! Renewals, and preventing them.

use super::step::Step;
use crate::command::{Renew, RenewKey};
use crate::kv::{ReadState, StateError};
use crate::limits::RENEWALS_PER_ENTRY_MAX;
use crate::outcome::{Outcome, Refusal, RenewOutcome};
use crate::records::Presence;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn renew(&mut self, renew: &Renew) -> Result<Outcome, StateError> {
        if renew.keys.len() > RENEWALS_PER_ENTRY_MAX {
            return Ok(Outcome::Refused(Refusal::Full("the number of renewals in one entry".to_owned())));
        }
        if self.view().drone(renew.drone_id)?.is_none() {
            return Ok(Outcome::Refused(Refusal::NoSuchDrone(renew.drone_id.to_string())));
        }
        let expiry_ms = self.cluster()?.lease.expiry_ms;
        let outcomes = renew
            .keys
            .iter()
            .map(|item| self.renew_one(renew.drone_id, item, expiry_ms))
            .collect::<Result<_, _>>()?;
        Ok(Outcome::Renewed(outcomes))
    }

    /// Invariant 4: drone, backend and token must match, the key must be unexpired and renewable. A backend that is
    /// ending still renews: it needs its key until nothing of it is left. One that its drone did not list does not.
    fn renew_one(
        &mut self,
        drone_id: i32,
        item: &RenewKey,
        expiry_ms: u64,
    ) -> Result<RenewOutcome, StateError> {
        let Some(backend) = self.view().backend_head(&item.backend_id)? else {
            return Ok(RenewOutcome::Unknown);
        };
        if backend.drone_id != drone_id || backend.presence == Presence::Leaving {
            return Ok(RenewOutcome::NotHolder);
        }
        // One that has terminated holds no key: the report that says so frees it in the same step.
        let (namespace, name) = (&backend.key.namespace, &backend.key.name);
        let Some(mut key) = self.view().key(namespace, name)? else { return Ok(RenewOutcome::NotHolder) };
        if key.backend_id != item.backend_id
            || item.token.is_some_and(|token| token != key.token)
            || key.expires_at_ms <= self.now_ms
        {
            return Ok(RenewOutcome::NotHolder);
        }
        if !key.allow_renew {
            return Ok(RenewOutcome::Prevented);
        }
        // One record is written: the expiry index stays stale until the sweep meets it.
        key.expires_at_ms = key.expires_at_ms.max(self.now_ms.saturating_add(expiry_ms));
        self.put_key(namespace, name, &key);
        Ok(RenewOutcome::Renewed)
    }

    pub(super) fn set_allow_renew(
        &mut self,
        namespace: &str,
        name: &str,
        allow: bool,
    ) -> Result<Outcome, StateError> {
        let Some(mut key) = self.view().key(namespace, name)? else {
            return Ok(Outcome::Refused(Refusal::NoSuchKey));
        };
        let changed = key.allow_renew != allow;
        if changed {
            key.allow_renew = allow;
            self.put_key(namespace, name, &key);
        }
        Ok(Outcome::Updated(changed))
    }
}
