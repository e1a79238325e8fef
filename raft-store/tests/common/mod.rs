//! Forming clusters of replicas in one process.

use holdfast_wire::LeaseConfig;
use raft_store::{InitRequest, Opened, Store, StoreConfig, Waiting};

/// Opens a directory that has no name yet.
pub async fn wait(config: &StoreConfig) -> Waiting {
    match Store::open(config.clone()).await.unwrap() {
        Opened::Waiting(waiting) => waiting,
        Opened::Member(store) => panic!("{config:?} is member {} already", store.id()),
    }
}

/// Opens the directory of a member.
pub async fn reopen(config: &StoreConfig) -> Store {
    match Store::open(config.clone()).await.unwrap() {
        Opened::Member(store) => store,
        Opened::Waiting(waiting) => panic!("{config:?}: {}", waiting.reason()),
    }
}

/// Runs a process on as the member that it has become.
pub async fn become_member(waiting: Waiting, config: &StoreConfig) -> Store {
    waiting.named().await;
    waiting.close().await;
    reopen(config).await
}

/// Forms a cluster of new directories; peers reach each at its address in `dialled`. Ids are 1..n in this order.
pub async fn form(configs: &[StoreConfig], dialled: Vec<String>, lease: LeaseConfig) -> Vec<Store> {
    let mut all = Vec::new();
    for config in configs {
        all.push(wait(config).await);
    }
    all[0].init(&InitRequest { members: dialled, lease }).await.unwrap();
    let mut stores = Vec::new();
    for (waiting, config) in all.into_iter().zip(configs) {
        stores.push(become_member(waiting, config).await);
    }
    stores
}
