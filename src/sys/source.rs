//! Puts descriptors into mio's loop.

/// Makes a type an event source by the descriptor in one of its fields.
macro_rules! source_by_descriptor {
    ($type:ty, $field:ident) => {
        impl mio::event::Source for $type {
            fn register(
                &mut self,
                registry: &mio::Registry,
                token: mio::Token,
                interests: mio::Interest,
            ) -> std::io::Result<()> {
                let descriptor = std::os::fd::AsRawFd::as_raw_fd(&self.$field);
                mio::unix::SourceFd(&descriptor).register(registry, token, interests)
            }

            fn reregister(
                &mut self,
                registry: &mio::Registry,
                token: mio::Token,
                interests: mio::Interest,
            ) -> std::io::Result<()> {
                let descriptor = std::os::fd::AsRawFd::as_raw_fd(&self.$field);
                mio::unix::SourceFd(&descriptor).reregister(registry, token, interests)
            }

            fn deregister(&mut self, registry: &mio::Registry) -> std::io::Result<()> {
                let descriptor = std::os::fd::AsRawFd::as_raw_fd(&self.$field);
                mio::unix::SourceFd(&descriptor).deregister(registry)
            }
        }
    };
}
pub(super) use source_by_descriptor;
