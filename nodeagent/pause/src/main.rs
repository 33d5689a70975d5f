//! The process that holds a pod's namespaces.
//!
//! It does nothing but be there, and reap: in a sandbox that shares one PID namespace it is that namespace's first process,
//! and the orphans of all containers become its children. It ends when it is told to (TERM or INT); as a namespace's first process it
//! would not even get a signal that it has no handler for, so it waits for those two.
//!
//! There are as many of it on a node as pods, so it has no standard library: one page of code, one of stack.
#![no_std]
#![no_main]

use core::arch::asm;

/// Nothing here panics; the compiler wants to know what would happen.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(101)
}

const SIGINT: u64 = 2;
const SIGTERM: u64 = 15;
const SIGCHLD: u64 = 17;
const SIG_BLOCK: usize = 0;
const WNOHANG: usize = 1;

#[cfg(target_arch = "x86_64")]
mod number {
    pub const RT_SIGPROCMASK: usize = 14;
    pub const WAIT4: usize = 61;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const EXIT_GROUP: usize = 231;
}

#[cfg(target_arch = "aarch64")]
mod number {
    pub const RT_SIGPROCMASK: usize = 135;
    pub const WAIT4: usize = 260;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const EXIT_GROUP: usize = 94;
}

/// A system call with four arguments; each caller says why its own is sound.
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's convention for x86-64: number in rax, arguments in rdi, rsi, rdx, r10; it clobbers rcx and r11 and leaves
    // everything else, and the stack, as it is.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// A system call with four arguments; each caller says why its own is sound.
#[cfg(target_arch = "aarch64")]
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's convention for AArch64: number in x8, arguments in x0 to x3, result in x0, nothing else touched.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a as isize => result, in("x1") b, in("x2") c, in("x3") d,
            options(nostack));
    }
    result
}

fn exit(code: usize) -> ! {
    loop {
        // SAFETY: exit_group takes a number and does not return.
        unsafe { call(number::EXIT_GROUP, code, 0, 0, 0) };
    }
}

/// The kernel starts here. Nothing of the stack it made (arguments, environment) is used.
#[unsafe(no_mangle)]
pub extern "C" fn _start() -> ! {
    let mask: u64 = 1 << (SIGINT - 1) | 1 << (SIGTERM - 1) | 1 << (SIGCHLD - 1);
    let set = (&raw const mask).addr();
    let size = size_of::<u64>();
    // SAFETY: `set` points to 8 bytes of signal mask that live as long as this function, and the old mask is not asked for.
    unsafe { call(number::RT_SIGPROCMASK, SIG_BLOCK, set, 0, size) };
    loop {
        // SAFETY: the kernel reads the mask; neither information nor a timeout is passed.
        let signal = unsafe { call(number::RT_SIGTIMEDWAIT, set, 0, 0, size) };
        if signal == SIGINT as isize || signal == SIGTERM as isize {
            exit(0);
        }
        // SAFETY: -1 stands for any child; neither status nor usage is asked for.
        while unsafe { call(number::WAIT4, usize::MAX, 0, WNOHANG, 0) } > 0 {}
    }
}
