//! Random bytes from the kernel.

#![allow(unsafe_code)]

use std::io;

/// Fills `buffer` from `getrandom(2)`; blocks only before the kernel's generator is seeded, early at boot.
///
/// # Errors
/// The system call's, such as `ENOSYS` before Linux 3.17.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        // SAFETY: pointer and length describe `rest`, which is writable and outlives the call.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(count) => filled += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn fills_every_byte() {
        let mut bytes = [0; 256];
        super::fill(&mut bytes).unwrap();
        assert!(bytes.iter().any(|b| *b != 0));
        assert!(bytes[128..] != bytes[..128]);
    }
}
