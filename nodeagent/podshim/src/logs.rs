//! Containers' output to their log files, in CRI format.
//!
//! A thread of its own does it, so that a disk that stalls holds back the pod's writers and nothing else: signals, ends, and
//! exec'd processes go on. The supervisor's children are made by clone3 from the main thread and use malloc; if this thread
//! held malloc's lock at that moment they would hang. So the thread allocates nothing and frees nothing after it has begun:
//! everything it works with is made by the main thread, sent as a pointer through a pipe, and sent back to be freed.
//!
//! Who is attached to a container gets a copy of its output through pipes of its own (taps). A reader that is slow holds the container
//! back for [`TAP_PATIENCE_MS`] at most; then it loses output until it has read all that it was given.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use minipod_podshim::protocol::LogSpec;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;

use crate::supervisor::drain::Flow;
use crate::sys;
use crate::tap::{self, Tap};

/// A longer line is written in pieces, as the field does.
const MAX_LINE_BYTES: usize = 16 << 10;
/// What is read at once; a pipe holds so much unless it was widened.
const READ_BYTES: usize = 64 << 10;
/// What is written at once, at most.
const WRITE_BYTES: usize = 128 << 10;
/// Longest head of a line.
const HEAD_BYTES: usize = 48;
/// Containers of a pod whose output is open at one time; a pod has at most a few dozen.
pub const MAX_TASKS: usize = 256;
/// Files kept at most, whatever is asked for.
const MAX_FILES: u32 = 100;
/// So long no output comes before the buffers' memory is given back.
const REST_MS: u16 = 1_000;
/// Event of the pipe with new tasks.
const NEW_TASKS: u64 = u64::MAX;
/// Who may be attached to one container at a time.
pub const MAX_TAPS: usize = 8;
/// How long one piece of output may wait for those who are attached.
const TAP_PATIENCE_MS: u64 = 200;
/// Bytes of a message to the thread: three numbers.
const MESSAGE_BYTES: usize = 3 * size_of::<usize>();

/// One container's output.
#[derive(Debug)]
pub struct Task {
    /// Chosen by the supervisor.
    id: u64,
    sink: Sink,
    streams: [Stream; 2],
    progress: Arc<Progress>,
}

/// How far a container's output has come; the supervisor looks at it when the container has ended.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that were read and written down.
    bytes: AtomicU64,
    /// Bit n: somebody could still write to stream n.
    open: AtomicU8,
}

impl Progress {
    /// As it is now.
    pub fn flow(&self) -> Flow {
        Flow { bytes: self.bytes.load(Ordering::Relaxed), held_open: self.open.load(Ordering::Relaxed) != 0 }
    }
}

#[derive(Debug)]
struct Stream {
    name: &'static [u8],
    pipe: Option<File>,
    /// The begin of a line whose end did not come yet.
    carry: Vec<u8>,
    taps: [Option<Tap>; MAX_TAPS],
}

impl Stream {
    fn new(name: &'static [u8], pipe: Option<OwnedFd>) -> Self {
        let pipe = pipe.map(File::from);
        Self { name, pipe, carry: Vec::with_capacity(MAX_LINE_BYTES), taps: [const { None }; MAX_TAPS] }
    }
}

impl Task {
    /// Opens the log of what is written to two pipes; of a terminal, which comes later, where there are none.
    ///
    /// # Errors
    /// When the file cannot be opened, or is not a file but a link.
    pub fn open(id: u64, spec: &LogSpec, pipes: Option<[OwnedFd; 2]>) -> io::Result<Box<Self>> {
        let kept = spec.max_files.clamp(1, MAX_FILES);
        let name = |number: u32| match number {
            0 => CString::new(spec.path.as_str()),
            number => CString::new(format!("{}.{number}", spec.path)),
        };
        let names = (0..kept.max(2)).map(name).collect::<Result<Vec<_>, _>>()?;
        let file = open_log(names.first().ok_or(Errno::EINVAL)?)?;
        let sink = Sink { size: file.metadata()?.size(), file, names, max_bytes: spec.max_bytes, keep: kept > 1 };
        let [stdout, stderr] = pipes.map_or([None, None], |pipes| pipes.map(Some));
        let streams = [Stream::new(b"stdout", stdout), Stream::new(b"stderr", stderr)];
        Ok(Box::new(Self { id, sink, streams, progress: Arc::default() }))
    }

    /// What a terminal shows is the container's output. Reading it must not block.
    pub fn read_terminal(&mut self, terminal: OwnedFd) {
        let [stdout, _] = &mut self.streams;
        stdout.pipe = Some(terminal.into());
    }

    /// How far it is.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }
}

fn open_log(name: &CString) -> nix::Result<File> {
    let flags = OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(open(name.as_c_str(), flags, Mode::from_bits_truncate(0o640))?.into())
}

// ------------------------------------------------------------------------------------------------- the main thread

/// The main thread's side.
#[derive(Debug)]
pub struct Logger {
    new: File,
    done: File,
}

impl Logger {
    /// Starts the thread and waits until it has everything that it will ever allocate.
    ///
    /// # Errors
    /// When pipes or the thread cannot be had.
    pub fn start() -> io::Result<Self> {
        let (new_out, new_in) = pipe2(OFlag::O_CLOEXEC)?;
        let (done_out, done_in) = pipe2(OFlag::O_CLOEXEC)?;
        let thread = Thread {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            new: new_out.into(),
            done: done_in.into(),
            slots: (0..MAX_TASKS).map(|_| None).collect(),
            input: vec![0; READ_BYTES],
            lines: Lines { out: Vec::with_capacity(WRITE_BYTES), clock: Clock::default() },
        };
        thread.epoll.add(&thread.new, EpollEvent::new(EpollFlags::EPOLLIN, NEW_TASKS))?;
        std::thread::Builder::new().name("logs".to_owned()).stack_size(64 << 10).spawn(move || thread.run())?;
        let mut done: File = done_out.into();
        let mut ready = [0; size_of::<usize>()];
        done.read_exact(&mut ready)?;
        nix::fcntl::fcntl(done.as_fd(), nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self { new: new_in.into(), done })
    }

    /// Hands a task over. At most [`MAX_TASKS`] may be open.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn add(&mut self, task: Box<Task>) -> io::Result<()> {
        let id = task.id as usize;
        self.send([Box::into_raw(task).expose_provenance(), id, 0])
    }

    /// Lets the pipes have a copy of what the task's streams bring from now on. They end with the streams; at once if the task has
    /// ended or has too many already.
    ///
    /// # Errors
    /// When the thread is gone.
    pub fn tap(&mut self, id: u64, pipes: [OwnedFd; 2]) -> io::Result<()> {
        let [stdout, stderr] = pipes.map(|pipe| pipe.into_raw_fd().cast_unsigned() as usize);
        self.send([0, id as usize, stdout << 32 | stderr])
    }

    fn send(&mut self, message: [usize; 3]) -> io::Result<()> {
        let mut bytes = [0; MESSAGE_BYTES];
        for (place, number) in bytes.chunks_exact_mut(size_of::<usize>()).zip(message) {
            place.copy_from_slice(&number.to_ne_bytes());
        }
        self.new.write_all(&bytes)
    }

    /// Readable when a task has ended.
    pub fn done(&self) -> &File {
        &self.done
    }

    /// The next task whose streams have both ended, with everything written; frees it.
    pub fn next_done(&mut self) -> Option<u64> {
        let mut bytes = [0; size_of::<usize>()];
        // Writes of so few bytes are whole, and so are reads of as many.
        match self.done.read(&mut bytes) {
            Ok(count) if count == bytes.len() => {
                let pointer = std::ptr::with_exposed_provenance_mut::<Task>(usize::from_ne_bytes(bytes));
                // SAFETY: the thread writes each pointer that it got from `add` once, after its last use of it, so this is
                // the box that `add` gave away and nobody else has it.
                let task = unsafe { Box::from_raw(pointer) };
                Some(task.id)
            }
            _ => None,
        }
    }
}

// -------------------------------------------------------------------------------------------------- the log thread

struct Thread {
    epoll: Epoll,
    new: File,
    done: File,
    slots: Vec<Option<Box<Task>>>,
    input: Vec<u8>,
    lines: Lines,
}

impl Thread {
    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 16];
        // Ready.
        let _ = self.done.write_all(&0_usize.to_ne_bytes());
        let mut timeout = EpollTimeout::NONE;
        loop {
            let count = match self.epoll.wait(&mut events, timeout) {
                // Quiet for a while: the buffers, which are empty, need no memory until there is output again.
                Ok(0) => {
                    sys::forget_content(&mut self.input);
                    sys::forget_spare(&mut self.lines.out);
                    timeout = EpollTimeout::NONE;
                    continue;
                }
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                // Nothing that this thread does leads here; without it containers would block for ever on full pipes.
                Err(_) => std::process::abort(),
            };
            timeout = REST_MS.into();
            for event in events.iter().take(count) {
                match event.data() {
                    // The other end is let go only by a supervisor that ends.
                    NEW_TASKS if !self.take_new() => return,
                    NEW_TASKS => {}
                    data => self.serve(data, event.events().contains(EpollFlags::EPOLLHUP)),
                }
            }
        }
    }

    /// False at the end of all tasks.
    fn take_new(&mut self) -> bool {
        let mut bytes = [0; MESSAGE_BYTES];
        if self.new.read_exact(&mut bytes).is_err() {
            return false;
        }
        let mut message = [0; 3];
        for (number, part) in message.iter_mut().zip(bytes.as_chunks().0) {
            *number = usize::from_ne_bytes(*part);
        }
        let [address, id, taps] = message;
        if address == 0 {
            self.take_taps(id as u64, [taps >> 32, taps & u32::MAX as usize]);
            return true;
        }
        let pointer = std::ptr::with_exposed_provenance_mut::<Task>(address);
        // SAFETY: the main thread writes each pointer once, straight from Box::into_raw, and keeps no other.
        let mut task = unsafe { Box::from_raw(pointer) };
        let Some(slot) = self.slots.iter().position(Option::is_none) else {
            self.give_back(task);
            return true;
        };
        for (number, stream) in task.streams.iter_mut().enumerate() {
            let Some(pipe) = &stream.pipe else { continue };
            let data = (slot as u64) << 1 | number as u64;
            if self.epoll.add(pipe, EpollEvent::new(EpollFlags::EPOLLIN, data)).is_ok() {
                task.progress.open.fetch_or(1 << number, Ordering::Relaxed);
            } else {
                stream.pipe = None;
            }
        }
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(task);
        }
        true
    }

    /// Descriptors that were sent as numbers get their owners, in the task that they are for or to be closed.
    fn take_taps(&mut self, id: u64, numbers: [usize; 2]) {
        // SAFETY: `Logger::tap` sends the numbers of descriptors that it owned and gave away with them, each once.
        let mut pipes = numbers.map(|number| Some(unsafe { File::from_raw_fd(number as i32) }));
        let Some(task) = self.slots.iter_mut().flatten().find(|task| task.id == id) else { return };
        for (stream, pipe) in task.streams.iter_mut().zip(&mut pipes) {
            if stream.pipe.is_some()
                && let Some(place) = stream.taps.iter_mut().find(|place| place.is_none())
            {
                *place = pipe.take().map(Tap::new);
            }
        }
    }

    fn serve(&mut self, data: u64, hung_up: bool) {
        let (slot, number) = ((data >> 1) as usize, (data & 1) as usize);
        let Some(place) = self.slots.get_mut(slot) else { return };
        let Some(task) = place else { return };
        let Task { sink, streams, progress, .. } = task.as_mut();
        let Some(stream) = streams.get_mut(number) else { return };
        let Some(pipe) = &mut stream.pipe else { return };
        if hung_up {
            progress.open.fetch_and(!(1 << number), Ordering::Relaxed);
        }
        match pipe.read(&mut self.input) {
            // A terminal does not block.
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Ok(count) if count > 0 => {
                let bytes = self.input.get(..count).unwrap_or(&[]);
                self.lines.take(stream.name, &mut stream.carry, bytes, sink);
                progress.bytes.fetch_add(count as u64, Ordering::Relaxed);
                tap::pass_on(&mut stream.taps, bytes, TAP_PATIENCE_MS);
            }
            // The end; a terminal's is an error.
            _ => {
                self.lines.finish(stream.name, &mut stream.carry, sink);
                let _ = self.epoll.delete(&*pipe);
                progress.open.fetch_and(!(1 << number), Ordering::Relaxed);
                stream.pipe = None;
                stream.taps = [const { None }; MAX_TAPS];
            }
        }
        if streams.iter().all(|stream| stream.pipe.is_none())
            && let Some(task) = place.take()
        {
            self.give_back(task);
        }
    }

    fn give_back(&mut self, task: Box<Task>) {
        let pointer = Box::into_raw(task).expose_provenance().to_ne_bytes();
        let _ = self.done.write_all(&pointer);
    }
}

/// From bytes to lines of a log. Allocates nothing.
struct Lines {
    /// Has room for [`WRITE_BYTES`] and never grows.
    out: Vec<u8>,
    clock: Clock,
}

impl Lines {
    fn take(&mut self, name: &[u8], carry: &mut Vec<u8>, mut bytes: &[u8], sink: &mut Sink) {
        self.clock.look();
        while !bytes.is_empty() {
            let room = MAX_LINE_BYTES - carry.len();
            let window = bytes.get(..room).unwrap_or(bytes);
            let used = match window.iter().position(|byte| *byte == b'\n') {
                Some(at) => {
                    self.put(name, b'F', [carry.as_slice(), window.get(..at).unwrap_or(&[])], sink);
                    carry.clear();
                    at + 1
                }
                None if window.len() == room => {
                    self.put(name, b'P', [carry.as_slice(), window], sink);
                    carry.clear();
                    room
                }
                None => {
                    carry.extend_from_slice(window);
                    window.len()
                }
            };
            bytes = bytes.get(used..).unwrap_or(&[]);
        }
        self.flush(sink);
    }

    /// What came without the end of its line.
    fn finish(&mut self, name: &[u8], carry: &mut Vec<u8>, sink: &mut Sink) {
        if !carry.is_empty() {
            self.clock.look();
            self.put(name, b'P', [carry.as_slice(), &[]], sink);
            carry.clear();
        }
        self.flush(sink);
    }

    fn put(&mut self, name: &[u8], tag: u8, parts: [&[u8]; 2], sink: &mut Sink) {
        let length = HEAD_BYTES + parts[0].len() + parts[1].len() + 1;
        if self.out.len() + length > WRITE_BYTES {
            self.flush(sink);
        }
        for part in [&self.clock.text, name, b" ", &[tag], b" ", parts[0], parts[1], b"\n"] {
            self.out.extend_from_slice(part);
        }
    }

    fn flush(&mut self, sink: &mut Sink) {
        if !self.out.is_empty() {
            sink.write(&self.out);
            self.out.clear();
        }
    }
}

/// The log file and those before it.
#[derive(Debug)]
struct Sink {
    file: File,
    size: u64,
    /// The file, then `.1`, `.2` ….
    names: Vec<CString>,
    max_bytes: u64,
    /// Whether a former file is kept at all.
    keep: bool,
}

impl Sink {
    /// Writes whole lines. What the disk does not take is lost: the container must not stand still because of it.
    fn write(&mut self, lines: &[u8]) {
        let length = lines.len() as u64;
        if self.max_bytes > 0 && self.size > 0 && self.size + length > self.max_bytes {
            self.rotate();
        }
        if self.file.write_all(lines).is_ok() {
            self.size += length;
        }
    }

    /// Each former file moves on by one, over the oldest; then a new one begins. Where that fails the old one grows on.
    fn rotate(&mut self) {
        if self.keep {
            for pair in self.names.windows(2).rev() {
                if let [from, to] = pair {
                    let _ = nix::fcntl::renameat(AT_FDCWD, from.as_c_str(), AT_FDCWD, to.as_c_str());
                }
            }
        } else if let Some(name) = self.names.first() {
            let _ = nix::unistd::unlink(name.as_c_str());
        }
        if let Some(Ok(file)) = self.names.first().map(open_log) {
            // Zero, unless the renaming failed.
            self.size = file.metadata().map_or(0, |meta| meta.size());
            self.file = file;
        }
    }
}

/// The time as text, made anew when a batch of output comes.
struct Clock {
    second: u64,
    /// `2026-01-02T03:04:05.123456789Z `
    text: [u8; 31],
}

impl Default for Clock {
    fn default() -> Self {
        Self { second: u64::MAX, text: *b"0000-00-00T00:00:00.000000000Z " }
    }
}

impl Clock {
    fn look(&mut self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.set(now.as_secs(), now.subsec_nanos());
    }

    fn set(&mut self, second: u64, nanos: u32) {
        if second != self.second {
            self.second = second;
            let (year, month, day) = date(second / 86_400);
            let of_day = second % 86_400;
            for (at, width, number) in [
                (0, 4, year),
                (5, 2, month),
                (8, 2, day),
                (11, 2, of_day / 3600),
                (14, 2, of_day / 60 % 60),
                (17, 2, of_day % 60),
            ] {
                self.digits(at, width, number);
            }
        }
        self.digits(20, 9, nanos.into());
    }

    fn digits(&mut self, at: usize, width: usize, mut number: u64) {
        for place in self.text.iter_mut().skip(at).take(width).rev() {
            // One digit.
            *place = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }
}

/// The Gregorian date of a day since 1970: years are counted from March in eras of 400 years, which are all alike.
fn date(days: u64) -> (u64, u64, u64) {
    let from_march_0 = days + 719_468;
    let (era, day_of_era) = (from_march_0 / 146_097, from_march_0 % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Lines {
        let mut clock = Clock::default();
        clock.set(1_767_323_045, 123_456_789);
        Lines { out: Vec::with_capacity(WRITE_BYTES), clock }
    }

    fn sink(dir: &std::path::Path, max_bytes: u64, max_files: u32) -> Sink {
        let path = dir.join("log").to_string_lossy().into_owned();
        let (a, b) = (pipe2(OFlag::O_CLOEXEC).expect("pipe").0, pipe2(OFlag::O_CLOEXEC).expect("pipe").0);
        Task::open(1, &LogSpec { path, max_bytes, max_files }, Some([a, b])).expect("open").sink
    }

    /// The log without its times.
    fn read(dir: &std::path::Path, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        text.lines().map(|line| line.split_once(' ').expect("a time").1.to_owned()).collect()
    }

    #[test]
    fn dates() {
        let mut clock = Clock::default();
        for (second, nanos, text) in [
            (0, 0, "1970-01-01T00:00:00.000000000Z "),
            (1_767_323_045, 123_456_789, "2026-01-02T03:04:05.123456789Z "),
            (951_782_399, 7, "2000-02-28T23:59:59.000000007Z "),
            (951_782_400, 0, "2000-02-29T00:00:00.000000000Z "),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z "),
            (1_735_689_599, 999_999_999, "2024-12-31T23:59:59.999999999Z "),
        ] {
            clock.set(second, nanos);
            assert_eq!(std::str::from_utf8(&clock.text).expect("ascii"), text);
        }
    }

    #[test]
    fn lines_come_whole_however_they_arrive() {
        let text = format!("one\n\ntwo {}\nthree", "x".repeat(2 * MAX_LINE_BYTES));
        for piece in [1, 7, 4096, READ_BYTES] {
            let dir = tempfile::tempdir().expect("tempdir");
            let (mut lines, mut carry, mut sink) =
                (lines(), Vec::with_capacity(MAX_LINE_BYTES), sink(dir.path(), 0, 1));
            text.as_bytes().chunks(piece).for_each(|chunk| lines.take(b"stdout", &mut carry, chunk, &mut sink));
            lines.finish(b"stdout", &mut carry, &mut sink);
            let log = read(dir.path(), "log");
            assert_eq!(log[..2], ["stdout F one", "stdout F "], "pieces of {piece}");
            assert_eq!(log[2].len(), "stdout P ".len() + MAX_LINE_BYTES);
            assert_eq!(log[4..], ["stdout F xxxx".to_owned(), "stdout P three".to_owned()]);
            assert_eq!(
                (carry.capacity(), lines.out.capacity()),
                (MAX_LINE_BYTES, WRITE_BYTES),
                "nothing was allocated"
            );
        }
    }

    #[test]
    fn files_are_rotated_and_bounded() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (mut lines, mut carry, mut sink) = (lines(), Vec::with_capacity(MAX_LINE_BYTES), sink(dir.path(), 300, 3));
        for number in 0..40 {
            lines.take(b"stderr", &mut carry, format!("line {number}\n").as_bytes(), &mut sink);
        }
        let all = [read(dir.path(), "log.2"), read(dir.path(), "log.1"), read(dir.path(), "log")].concat();
        let expected: Vec<String> = (40 - all.len()..40).map(|number| format!("stderr F line {number}")).collect();
        assert_eq!(all, expected);
        assert!(!dir.path().join("log.3").exists());
        for name in ["log", "log.1", "log.2"] {
            assert!(std::fs::metadata(dir.path().join(name)).expect(name).len() <= 300);
        }
    }

    #[test]
    fn a_log_is_not_written_through_a_link() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::os::unix::fs::symlink("/dev/null", dir.path().join("log")).expect("link");
        let path = dir.path().join("log").to_string_lossy().into_owned();
        let (a, b) = (pipe2(OFlag::O_CLOEXEC).expect("pipe").0, pipe2(OFlag::O_CLOEXEC).expect("pipe").0);
        let opened = Task::open(1, &LogSpec { path, ..LogSpec::default() }, Some([a, b]));
        assert_eq!(opened.expect_err("a link").raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn the_thread_writes_and_gives_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut logger = Logger::start().expect("start");
        let mut writers = Vec::new();
        for id in 0..5 {
            let path = dir.path().join(format!("log-{id}")).to_string_lossy().into_owned();
            let ((a, out), (b, err)) = (pipe2(OFlag::O_CLOEXEC).expect("pipe"), pipe2(OFlag::O_CLOEXEC).expect("pipe"));
            logger
                .add(Task::open(id, &LogSpec { path, ..LogSpec::default() }, Some([a, b])).expect("open"))
                .expect("add");
            writers.push((File::from(out), File::from(err)));
        }
        for (number, (out, err)) in writers.iter_mut().enumerate() {
            out.write_all(format!("out {number}\n").as_bytes()).expect("write");
            err.write_all(format!("err {number}\n").as_bytes()).expect("write");
        }
        drop(writers);
        let mut done = Vec::new();
        while done.len() < 5 {
            let mut poll = [nix::poll::PollFd::new(logger.done().as_fd(), nix::poll::PollFlags::POLLIN)];
            assert_eq!(nix::poll::poll(&mut poll, 10_000_u16).expect("poll"), 1, "only {done:?} came back");
            done.extend(logger.next_done());
        }
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 3, 4]);
        for id in 0..5 {
            let mut log = read(dir.path(), &format!("log-{id}"));
            log.sort();
            assert_eq!(log, [format!("stderr F err {id}"), format!("stdout F out {id}")]);
        }
    }
}
