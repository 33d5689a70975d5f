//! The orderly end: SIGTERM or SIGINT once asks for it, a second one ends the process at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Tells every task that the process is to end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

/// The other end of a [`Shutdown`]: asks for the end, also when dropped.
#[derive(Debug)]
pub struct Trigger(watch::Sender<bool>);

impl Trigger {
    /// Asks for the end; asking again changes nothing.
    pub fn end(&self) {
        self.0.send_replace(true);
    }
}

impl Shutdown {
    /// A shutdown that is asked for by the trigger alone.
    #[must_use]
    pub fn manual() -> (Trigger, Self) {
        let (sender, receiver) = watch::channel(false);
        (Trigger(sender), Self(receiver))
    }

    /// A shutdown that SIGTERM and SIGINT ask for.
    ///
    /// # Errors
    /// When the signal handlers cannot be set.
    pub fn on_signals() -> std::io::Result<Self> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let (trigger, shutdown) = Self::manual();
        tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::info!("asked to end");
            trigger.end();
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            tracing::warn!("asked to end again: ending at once");
            std::process::exit(1);
        });
        Ok(shutdown)
    }

    /// Returns when the end is asked for; at once when it has been.
    pub async fn asked(&self) {
        let mut receiver = self.0.clone();
        // An error means that the trigger is gone, and nobody else could ask any more.
        let _ = receiver.wait_for(|asked| *asked).await;
    }

    /// Whether the end has been asked for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_clone_hears_the_end_also_a_late_one() {
        let (trigger, shutdown) = Shutdown::manual();
        let early = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.asked().await }
        });
        assert!(!shutdown.is_asked());
        trigger.end();
        early.await.expect("the task ends");
        assert!(shutdown.is_asked());
        shutdown.clone().asked().await;
    }

    #[tokio::test]
    async fn a_lost_trigger_asks_for_the_end() {
        let (trigger, shutdown) = Shutdown::manual();
        drop(trigger);
        shutdown.asked().await;
        assert!(shutdown.is_asked());
    }
}
