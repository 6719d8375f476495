//! A man in the middle, in the namespace of the server: plain HTTP on one side, the real server on the other, and answers of
//! its own when the test wants them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use flanneld::sys::netns;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};

use super::api::Cluster;
use super::world::STORE;

const PORT: u16 = 8001;

#[derive(Debug, Default)]
struct Shared {
    fault: Option<String>,
    /// Connections to cut when the mind changes.
    open: Vec<TcpStream>,
}

#[derive(Debug)]
pub(super) struct Proxy(Arc<Mutex<Shared>>);

impl Proxy {
    pub(super) fn start(cluster: &Cluster) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(cluster.dir.join("ca.pem")).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let config = Arc::new(config);
        let (namespace, state) = (format!("{}-net", cluster.world.id), Arc::clone(&shared));
        let (ready, is_ready) = std::sync::mpsc::channel();
        thread::spawn(move || {
            netns::enter(&namespace).unwrap();
            let listener = TcpListener::bind((STORE, PORT)).unwrap();
            ready.send(()).unwrap();
            for client in listener.incoming().map_while(Result::ok) {
                let (config, state, namespace) =
                    (Arc::clone(&config), Arc::clone(&state), namespace.clone());
                thread::spawn(move || {
                    netns::enter(&namespace).unwrap();
                    serve(client, &config, &state)
                });
            }
        });
        is_ready.recv().unwrap();
        Self(shared)
    }

    pub(super) fn url(&self) -> String {
        format!("http://{STORE}:{PORT}")
    }

    /// Every connection is cut; new ones are answered with this, or by the server.
    pub(super) fn answer_with(&self, fault: Option<&str>) {
        let mut shared = self.0.lock().unwrap();
        shared.fault = fault.map(str::to_owned);
        for connection in shared.open.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

fn serve(mut client: TcpStream, config: &Arc<rustls::ClientConfig>, shared: &Mutex<Shared>) {
    let fault = {
        let mut shared = shared.lock().unwrap();
        shared.open.push(client.try_clone().unwrap());
        shared.fault.clone()
    };
    if let Some(fault) = fault {
        let mut request = [0; 4096];
        let _ = client.read(&mut request);
        let _ = client.write_all(fault.as_bytes());
        // another handle of it is kept, so that dropping this one does not close it
        let _ = client.shutdown(Shutdown::Both);
        return;
    }
    let Ok(server) = TcpStream::connect((STORE, 6443)) else { return };
    let name = ServerName::try_from(STORE).unwrap();
    let mut session = rustls::ClientConnection::new(Arc::clone(config), name).unwrap();
    let mut server = server;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    }
    let mut bytes = [0; 16 << 10];
    let waits = |error: &std::io::Error| {
        matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
    };
    loop {
        match client.read(&mut bytes) {
            Ok(0) => return,
            Ok(len) => {
                let mut tls = rustls::Stream::new(&mut session, &mut server);
                if tls.write_all(&bytes[..len]).is_err() {
                    return;
                }
            }
            Err(error) if waits(&error) => {}
            Err(_) => return,
        }
        let mut tls = rustls::Stream::new(&mut session, &mut server);
        match tls.read(&mut bytes) {
            Ok(0) => return,
            Ok(len) => {
                if client.write_all(&bytes[..len]).is_err() {
                    return;
                }
            }
            Err(error) if waits(&error) => {}
            Err(_) => return,
        }
    }
}
