//! Name resolution off the loop: one worker thread, started when the first name must be resolved.

#![allow(clippy::disallowed_methods)]

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use mio::Waker;

/// The answer to question number `ticket`: the addresses, or why there are none.
#[derive(Debug)]
pub(super) struct Resolved {
    pub(super) ticket: u64,
    pub(super) addresses: Result<Vec<SocketAddr>, String>,
}

#[derive(Debug)]
struct Question {
    ticket: u64,
    host: String,
    port: u16,
}

/// Asks the system's resolver.
#[derive(Debug)]
pub(super) struct Resolver {
    waker: Arc<Waker>,
    worker: Option<Sender<Question>>,
    answers: (Sender<Resolved>, Receiver<Resolved>),
}

impl Resolver {
    /// `waker` is woken when an answer is there.
    pub(super) fn new(waker: Arc<Waker>) -> Self {
        Self { waker, worker: None, answers: mpsc::channel() }
    }

    /// Puts a question. The answer comes through [`Resolver::next`].
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn ask(&mut self, ticket: u64, host: &str, port: u16) -> Result<(), String> {
        let question = Question { ticket, host: host.to_owned(), port };
        let question = match &self.worker {
            None => question,
            Some(worker) => match worker.send(question) {
                Ok(()) => return Ok(()),
                // it has died; the next one may not
                Err(returned) => returned.0,
            },
        };
        let (questions, asked) = mpsc::channel::<Question>();
        let (answers, waker) = (self.answers.0.clone(), Arc::clone(&self.waker));
        thread::Builder::new()
            .name("resolver".into())
            .stack_size(128 * 1024)
            .spawn(move || {
                for Question { ticket, host, port } in asked {
                    let found = (host.as_str(), port).to_socket_addrs();
                    let addresses = match found.map(Iterator::collect::<Vec<_>>) {
                        Ok(addresses) if addresses.is_empty() => {
                            Err(format!("{host} has no address"))
                        }
                        Ok(addresses) => Ok(addresses),
                        Err(error) => Err(format!("resolve {host}: {error}")),
                    };
                    let gone = answers.send(Resolved { ticket, addresses }).is_err();
                    if gone || waker.wake().is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| format!("start the resolver: {error}"))?;
        questions.send(question).map_err(|_| "the resolver ended".to_owned())?;
        self.worker = Some(questions);
        Ok(())
    }

    /// The next answer, if there is one.
    pub(super) fn next(&self) -> Option<Resolved> {
        self.answers.1.try_recv().ok()
    }
}
