//! The hard deadline in a page of memory that the guard shares with the process that watches over it.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI64, Ordering};

/// The hard deadline, in milliseconds of `CLOCK_BOOTTIME`. Forked children of the process that made it see every change.
///
/// A page, not a pipe: nobody has to be scheduled for a change to be seen, and a stopped guard cannot hold one up.
#[derive(Debug)]
pub struct SharedDeadline {
    hard_boot_ms: NonNull<AtomicI64>,
}

impl SharedDeadline {
    /// With this deadline. The page is never unmapped: a guard and its children need it to their end.
    pub fn new(hard_boot_ms: i64) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<AtomicI64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let Some(page) = NonNull::new(page.cast::<AtomicI64>()) else {
            return Err(io::Error::other("the shared page is at address 0"));
        };
        let shared = Self { hard_boot_ms: page };
        shared.set(hard_boot_ms);
        Ok(shared)
    }

    /// Moves it.
    pub fn set(&self, hard_boot_ms: i64) {
        self.atomic().store(hard_boot_ms, Ordering::SeqCst);
    }

    /// Where it stands.
    pub fn get(&self) -> i64 {
        self.atomic().load(Ordering::SeqCst)
    }

    fn atomic(&self) -> &AtomicI64 {
        // SAFETY: the page is aligned, zeroed at first (a valid value), only accessed as this atomic, and never unmapped.
        unsafe { self.hard_boot_ms.as_ref() }
    }
}
