//! Memory that the allocator keeps although nobody uses it.

/// Gives the kernel back what was allocated for a while: glibc keeps it otherwise, page by page between what still lives
/// (malloc_trim(3)). Whoever allocates meanwhile may wait, some milliseconds for each hundred megabytes that go.
pub fn give_back() {
    // SAFETY: takes no pointer, and may be called by any thread at any time.
    unsafe { libc::malloc_trim(0) };
}
