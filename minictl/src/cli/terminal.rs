//! The terminal that minictl runs on: raw while a remote program draws on it, and given back on every way out.

use std::io;
use std::sync::{Mutex, Once, PoisonError};

use minipod_proto::v1::TerminalSize;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::CliError;

/// As the terminal was; in a static, because a release panics without unwinding and only the hook runs then.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// While it exists the terminal passes every key on and changes nothing.
#[derive(Debug)]
pub struct Raw(());

impl Raw {
    /// Begins raw mode on standard input.
    ///
    /// # Errors
    /// When it is no terminal, or does not obey.
    pub fn begin() -> Result<Self, CliError> {
        let failed = |errno: rustix::io::Errno| {
            let text = format!("make the terminal raw: {}", io::Error::from(errno));
            CliError::usage(text, "leave out -t; with -i standard input is passed on")
        };
        let before = tcgetattr(stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        HOOK.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |about| {
                restore();
                usual(about);
            }));
        });
        let guard = Self(());
        tcsetattr(stdin(), OptionalActions::Drain, &raw).map_err(failed)?;
        Ok(guard)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // Held for moments only, by whoever is about to change the same: in a panic at that point there is nothing to restore yet.
    let Ok(mut before) = BEFORE.try_lock() else { return };
    if let Some(before) = before.take() {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// The terminal's size; 0 by 0 when it does not say.
pub fn size() -> TerminalSize {
    let size = tcgetwinsize(stdin());
    size.map_or_else(
        |_| TerminalSize::default(),
        |size| TerminalSize { rows: size.ws_row.into(), columns: size.ws_col.into() },
    )
}

/// The signals that ask a program to end: with them the terminal must be given back first.
#[derive(Debug)]
pub struct Ends([(Signal, i32); 4]);

impl Ends {
    /// From now on they do not end minictl by themselves.
    ///
    /// # Errors
    /// When the system does not let it listen.
    pub fn listen() -> Result<Self, CliError> {
        let listen = |kind: SignalKind| {
            let failed = |error: io::Error| CliError::usage(format!("listen to signals: {error}"), "leave out -t");
            Ok::<_, CliError>((signal(kind).map_err(failed)?, 128 + kind.as_raw_value()))
        };
        let (terminate, hangup) = (listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
        Ok(Self([terminate, hangup, listen(SignalKind::interrupt())?, listen(SignalKind::quit())?]))
    }

    /// The exit code for the next of them: 128 + its number. Cancel safe.
    pub async fn next(&mut self) -> i32 {
        let [(a, a_code), (b, b_code), (c, c_code), (d, d_code)] = &mut self.0;
        tokio::select! {
            Some(()) = a.recv() => *a_code,
            Some(()) = b.recv() => *b_code,
            Some(()) = c.recv() => *c_code,
            Some(()) = d.recv() => *d_code,
            else => std::future::pending().await,
        }
    }
}
