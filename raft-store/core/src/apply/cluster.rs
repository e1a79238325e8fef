//! Forming the cluster, and its configuration.

use super::step::Step;
use crate::codec::encode;
use crate::command::FormCluster;
use crate::kv::{ReadState, StateError, Table, keys};
use crate::outcome::{Effect, Outcome, Refusal};
use crate::records::ClusterRecord;
use holdfast_wire::LeaseConfig;

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn form_cluster(&mut self, form: &FormCluster) -> Result<Outcome, StateError> {
        if self.cluster_if_formed().is_some() {
            return Ok(Outcome::Formed(false));
        }
        if let Err(error) = form.lease.check() {
            return Ok(Outcome::Refused(Refusal::Lease(error.to_string())));
        }
        let mut record = ClusterRecord {
            cluster_id: form.cluster_id.clone(),
            token_secret: form.token_secret,
            lease: form.lease,
            terminated_keep_ms: form.terminated_keep_ms,
        };
        if let Some(mut restored) = self.view().restored()? {
            // The old cluster's durations, whatever is proposed: its backends are still running by them. Identity and
            // secret are new, so that its drones, and those that hold its tokens, can tell the difference.
            record.lease = restored.lease;
            record.terminated_keep_ms = restored.terminated_keep_ms;
            let quarantine_ms = restored.quarantine_ms.max(restored.lease.expiry_ms);
            restored.acquisitions_from_ms = Some(self.now_ms.saturating_add(quarantine_ms));
            self.txn.put(Table::Meta, keys::RESTORED.to_vec(), encode(&restored));
        }
        self.put_cluster(record);
        self.effect(Effect::Formed);
        Ok(Outcome::Formed(true))
    }

    pub(super) fn set_lease(&mut self, lease: LeaseConfig) -> Result<Outcome, StateError> {
        if let Err(error) = lease.check() {
            return Ok(Outcome::Refused(Refusal::Lease(error.to_string())));
        }
        if self.progress.keys_held > 0 {
            return Ok(Outcome::Refused(Refusal::Lease(format!(
                "lease durations can't be changed while keys are held ({} are)",
                self.progress.keys_held
            ))));
        }
        let mut cluster = self.cluster()?.clone();
        let changed = cluster.lease != lease;
        if changed {
            cluster.lease = lease;
            self.put_cluster(cluster);
        }
        Ok(Outcome::Updated(changed))
    }
}
