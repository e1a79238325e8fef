//! openraft's own storage conformance suite on our store.

use crate::log_store::LogStore;
use crate::snapshots::Snapshots;
use crate::state_db::StateHandle;
use crate::state_machine::{AppliedTo, StateMachine};
use crate::types::{Stamper, TypeConfig};
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::sync::watch;

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let dir = TempDir::new().unwrap();
        let stamper = Arc::new(Stamper::default());
        let state = StateHandle::open(&dir.path().join("state")).unwrap();
        let snapshots = Arc::new(Snapshots::open(&dir.path().join("snapshots")).unwrap());
        let durable = state.clone();
        let log = LogStore::open(
            &dir.path().join("log"),
            stamper.clone(),
            Box::new(move || durable.make_durable()),
        )
        .unwrap();
        let machine = StateMachine::new(
            state,
            snapshots,
            stamper,
            watch::Sender::new(AppliedTo::default()),
            watch::Sender::default(),
            Arc::default(),
        )
        .unwrap();
        Ok((dir, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openrafts_storage_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}
