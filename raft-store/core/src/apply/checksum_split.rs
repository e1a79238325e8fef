//! Replicas whose checksums differ without a majority (invariant 6): acquisitions stop until an operator decides.
//!
//! The record depends on the entries alone, never on this replica's own checksum: the replicas that disagree still answer
//! every acquisition alike.

use super::step::Step;
use crate::checksums::show_values;
use crate::kv::{ReadState, StateError};
use crate::limits::CHECKSUM_SPLIT_VALUES_MAX;
use crate::outcome::{Outcome, Refusal};
use crate::records::{AcceptedChecksum, ChecksumSplit, ChecksumsRecord};

impl<R: ReadState + ?Sized> Step<'_, '_, R> {
    pub(super) fn note_checksum_split(
        &mut self,
        index: u64,
        values: &[(u64, u64)],
    ) -> Result<Outcome, StateError> {
        // A late entry must not reopen what an operator has decided.
        if self.checksums.accepted.is_some_and(|accepted| index <= accepted.index) {
            return Ok(Outcome::Updated(false));
        }
        let mut split = match &self.checksums.split {
            None => ChecksumSplit { index, values: Vec::new() },
            Some(known) if known.index == index => known.clone(),
            // One decision at a time: this one says which replicas are right at later indexes too.
            Some(_) => return Ok(Outcome::Updated(false)),
        };
        for (member, value) in values {
            if let Err(at) = split.values.binary_search_by_key(member, |(known, _)| *known)
                && split.values.len() < CHECKSUM_SPLIT_VALUES_MAX
            {
                split.values.insert(at, (*member, *value));
            }
        }
        let changed = self.checksums.split.as_ref() != Some(&split);
        if changed {
            let record = ChecksumsRecord { split: Some(split), ..self.checksums.clone() };
            self.put_checksums(record);
        }
        Ok(Outcome::Updated(changed))
    }

    pub(super) fn accept_checksum(&mut self, index: u64, value: u64) -> Result<Outcome, StateError> {
        let refused = |why: String| Ok(Outcome::Refused(Refusal::Checksum(why)));
        let Some(split) = &self.checksums.split else {
            return match self.checksums.accepted {
                Some(accepted) if (accepted.index, accepted.value) == (index, value) => {
                    Ok(Outcome::Updated(false))
                }
                _ => {
                    refused("the controllers' checksums do not differ: there is nothing to decide".to_owned())
                }
            };
        };
        if split.index != index || !split.values.iter().any(|(_, seen)| *seen == value) {
            return refused(format!(
                "what is to be decided is the checksum at index {}, where {}",
                split.index,
                show_values(&split.values)
            ));
        }
        let accepted = AcceptedChecksum { index, value, at_ms: self.now_ms };
        self.put_checksums(ChecksumsRecord { split: None, accepted: Some(accepted) });
        Ok(Outcome::Updated(true))
    }
}
