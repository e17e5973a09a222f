//! A stock Debian kernel in an emulated machine: for what only a real kernel's NBD client can show.
//!
//! One machine for all tests of a process, which have it one after another. It reaches servers of this
//! host's loopback at [`HOST`]; the test reaches a shell in it, and the CSI driver's socket, by forwarded
//! ports. Its console is a file, printed when a test fails.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::process::{self, Running};
use crate::scratch::{self, Scratch};
use crate::wait;

/// This host's loopback, as the guest sees it.
pub const HOST: &str = "10.0.2.2";

/// Programs of ours that the guest has.
const PROGRAMS: [&str; 2] = ["ballast-csi", "ballastd"];

/// Ports of the guest (scripts/kernel-guest.sh).
const RELAY: u16 = 9000;
const SHELL: u16 = 9001;

/// Seconds for a boot: about 15 on a quiet machine, whose processors are emulated.
const BOOT: u64 = 180;

/// How long a script may be silent.
const SILENCE: Duration = Duration::from_secs(120);

/// Lines of its console that a failed test prints.
const CONSOLE_LINES: usize = 120;

static GUEST: Mutex<Option<Guest>> = Mutex::new(None);

/// The machine.
#[derive(Debug)]
pub struct Guest {
    qemu: Running,
    shell: u16,
    relay: u16,
    console: PathBuf,
}

/// The machine, for one test. A test that fails takes it down: the next one boots another.
#[derive(Debug)]
pub struct Held(MutexGuard<'static, Option<Guest>>);

impl Deref for Held {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        self.0.as_ref().expect("it was booted when it was taken")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        if let Some(guest) = self.0.take() {
            let console = guest.console();
            let lines: Vec<&str> = console.lines().collect();
            let end = &lines[lines.len().saturating_sub(CONSOLE_LINES)..];
            eprintln!("the end of the guest's console:\n{}", end.join("\n"));
        }
    }
}

impl Guest {
    /// Waits for its turn, and boots the machine if there is none.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn take() -> Held {
        let mut slot = GUEST.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(boot());
        }
        Held(slot)
    }

    /// Runs a script in it and returns what it printed. Its first command that fails ends it.
    ///
    /// # Panics
    /// When it fails; the message holds its output.
    #[track_caller]
    pub fn run(&self, script: &str) -> String {
        let (code, output) = self.output(script);
        assert_eq!(code, 0, "in the guest: {script}\n{output}");
        output
    }

    /// Runs a script in it to its end, and returns its exit code and what it printed.
    ///
    /// # Panics
    /// When it is silent for too long.
    #[track_caller]
    pub fn output(&self, script: &str) -> (i32, String) {
        let mut shell = TcpStream::connect(("127.0.0.1", self.shell)).expect("QEMU listens");
        shell.set_read_timeout(Some(SILENCE)).expect("a time above zero");
        let wrapped =
            format!("(set -e\n{script}\n) </dev/null 2>&1\necho \"exit code $?\"\nexit\n");
        shell.write_all(wrapped.as_bytes()).expect("QEMU reads");
        let mut said = Vec::new();
        let ended = shell.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said).into_owned();
        let end = said.trim_end().rsplit_once("exit code ");
        let code = end.and_then(|(_, code)| code.parse().ok());
        match (ended, end, code) {
            (Ok(_), Some((output, _)), Some(code)) => (code, output.to_owned()),
            (ended, ..) => panic!("no end ({ended:?}) of {script}\nin the guest, it said {said:?}"),
        }
    }

    /// Where the guest's `/run/csi.sock` answers on this host.
    pub fn relay(&self) -> String {
        format!("http://127.0.0.1:{}", self.relay)
    }

    /// What it wrote on its console so far.
    pub fn console(&self) -> String {
        let console = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&console).into_owned()
    }
}

fn boot() -> Guest {
    let scratch = Scratch::new("guest");
    let folder = scratch::binaries().parent().expect("it lies in target").join("kernel-guest");
    let initrd = scratch.file("initrd");
    make(&folder, &initrd);
    let console = folder.join("console.log");
    // A new file: another guest may write to the one of its own boot.
    let _ = std::fs::remove_file(&console);
    let (relay, shell) = (free_port(), free_port());
    let words = command(&folder, &initrd, &console, relay, shell);
    let mut guest = Guest { qemu: start(folder.join("qemu.log"), words), shell, relay, console };
    wait::until_true("the guest", BOOT, || {
        let running = guest.qemu.is_running();
        assert!(running, "QEMU ended: {}\n{}", guest.qemu.log(), guest.console());
        guest.console().contains("guest is ready")
    });
    guest
}

#[track_caller]
fn make(folder: &Path, initrd: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in it");
    let script = root.join("scripts/kernel-guest.sh").display().to_string();
    let programs = PROGRAMS.map(|name| scratch::program(name).display().to_string());
    let mut arguments = vec![script, folder.display().to_string(), initrd.to_owned()];
    arguments.extend(programs);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    process::run("bash", &arguments);
}

/// A port that nobody has now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there are free ports");
    listener.local_addr().expect("it is bound").port()
}

fn command(folder: &Path, initrd: &str, console: &Path, relay: u16, shell: u16) -> Vec<String> {
    let forward = |port: u16, to: u16| format!("hostfwd=tcp:127.0.0.1:{port}-:{to}");
    let network = format!("user,id=net,{},{}", forward(relay, RELAY), forward(shell, SHELL));
    let kernel = folder.join("vmlinuz").display().to_string();
    let console = format!("file,id=console,path={}", console.display());
    // Always emulated, so that it is the same machine everywhere; with one thread for all of it,
    // since QEMU 7.2 loses track of code that patches itself with more. `no_timer_check`: on a busy
    // host the kernel would see too few ticks while it tests its timer, and panic.
    let words = "qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none \
                 -machine q35 -accel tcg,thread=single -cpu max -smp 4 -m 1024 \
                 -device virtio-net-pci,netdev=net,romfile= -serial chardev:console";
    let more = [
        ("-kernel", kernel.as_str()),
        ("-initrd", initrd),
        ("-append", "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0 no_timer_check"),
        ("-netdev", &network),
        ("-chardev", &console),
    ];
    let more = more.into_iter().flat_map(|(option, value)| [option, value]);
    words.split_whitespace().chain(more).map(str::to_owned).collect()
}

/// Starts it from a thread that never ends: a process of ours dies with the thread that started it,
/// and this one is to live for several tests.
fn start(log: PathBuf, words: Vec<String>) -> Running {
    let (started, start) = mpsc::channel();
    std::thread::spawn(move || {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        // Who asked may have panicked; then the process ends with this value.
        let _ = started.send(Running::start(&log, &words, false));
        loop {
            std::thread::park();
        }
    });
    start.recv().expect("QEMU is installed")
}
