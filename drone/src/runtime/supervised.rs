//! A runtime whose tasks may panic: a backend that no task watches any more is ended, and not renewed forever.

use super::watcher::tell;
use super::{BackendSpec, Runtime};
use crate::adopt::Link;
use crate::backend_state::{Desired, Observation};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tracing::error;

/// Time between two attempts to end what a failed task has left.
const AGAIN: Duration = Duration::from_secs(1);

/// See the module.
pub struct Supervised {
    inner: Arc<dyn Runtime>,
}

impl Supervised {
    /// Supervises this runtime.
    pub fn new(inner: Arc<dyn Runtime>) -> Self {
        Self { inner }
    }

    /// Runs a task over one backend. After a panic of it, ends the backend as [`Runtime::end_left`] does, and reports that.
    fn supervise(
        &self,
        id: String,
        facts: mpsc::Sender<Observation>,
        task: impl FnOnce(&dyn Runtime) -> BoxFuture<'static, ()> + Send + 'static,
    ) -> BoxFuture<'static, ()> {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            if survives(async { task(inner.as_ref()).await }).await {
                return;
            }
            error!(backend = id, "the task that watches it has panicked: ending it");
            while !survives(async { inner.end_left(id.clone()).await }).await {
                sleep(AGAIN).await;
            }
            tell(&facts, Observation::Failed).await;
            tell(&facts, Observation::Gone).await;
        })
    }
}

/// Whether it comes to its end without a panic. What it holds is dropped then, and not used again.
async fn survives(future: impl Future<Output = ()>) -> bool {
    AssertUnwindSafe(future).catch_unwind().await.is_ok()
}

impl Runtime for Supervised {
    fn run(
        &self,
        spec: BackendSpec,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        let (id, of_task) = (spec.id.clone(), facts.clone());
        self.supervise(id, facts, move |runtime| runtime.run(spec, want, of_task))
    }

    fn adopt(
        &self,
        id: String,
        link: Link,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        let of_task = facts.clone();
        self.supervise(id.clone(), facts, move |runtime| runtime.adopt(id, link, want, of_task))
    }

    fn end_left(&self, id: String) -> BoxFuture<'static, ()> {
        self.inner.end_left(id)
    }
}
