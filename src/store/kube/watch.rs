//! The watch: every change of every node's metadata, of which nearly all are heart-beats.

use std::time::Instant;

use log::{debug, info};

use super::nodes::{Seen, Standing};
use super::request::{Answer, Freshness, Refusal};
use super::stream::Frames;
use super::wire::{self, Metadata, Status, WatchEvent};
use super::{Job, Kube, RETRY_FIRST};
use crate::http::HttpEvent;
use crate::store::Now;

impl Kube {
    pub(super) fn handle_watch(&mut self, event: HttpEvent<'_>, now: Now) {
        match event {
            HttpEvent::Head { status, headers } => {
                self.watch_answer = Answer::head(status, headers);
                self.frames = Frames::default();
                if self.watch_answer.is_ok() {
                    self.watch_open = true;
                    self.reached();
                    self.done(Job::Watch);
                }
            }
            HttpEvent::Body(bytes) if !self.watch_answer.is_ok() => self.watch_answer.body(bytes),
            HttpEvent::Body(bytes) => {
                let mut frames = std::mem::take(&mut self.frames);
                let mut take = |frame: &[u8]| self.handle_frame(&wire::decode(frame)?, now.mono);
                let pushed = frames.push(bytes, &mut take);
                self.frames = frames;
                if let Err(reason) = pushed {
                    self.cancel_watch |= self.watch.busy;
                    self.watch_failed(&format!("watch the nodes: {reason}"), now.mono);
                }
            }
            HttpEvent::Done => {
                self.watch.busy = false;
                if !self.watch_answer.is_ok() {
                    let refusal = self.watch_answer.refusal();
                    return self.watch_refused(&refusal, now.mono);
                }
                // it ends every few minutes; one that ends at once must not be opened in a circle
                self.watch_open = false;
                self.watch.not_before = Some(now.mono + self.watch.backoff.failed());
            }
            HttpEvent::Failed(reason) => {
                self.watch.busy = false;
                self.watch_failed(reason, now.mono);
            }
        }
    }

    pub(super) fn handle_frame(&mut self, event: &WatchEvent, now: Instant) -> Result<(), String> {
        // what comes after the end of this watch was decided
        if !self.watch_open {
            return Ok(());
        }
        if event.kind == "ERROR" {
            let status: Status = event.object()?;
            let code = u16::try_from(status.code).unwrap_or(500);
            let refusal = Refusal { status: code, message: status.message, retry_after: None };
            self.cancel_watch |= self.watch.busy;
            self.watch_refused(&refusal, now);
            return Ok(());
        }
        let metadata = event.object::<Metadata>()?.metadata.unwrap_or_default();
        if !metadata.resource_version.is_empty() {
            self.cursor = Some(metadata.resource_version.clone());
        }
        self.watch.backoff.succeeded();
        if event.kind == "BOOKMARK" || metadata.name.is_empty() {
            return Ok(());
        }
        let name = &*metadata.name;
        let is_own = name == self.node_name();
        match &*event.kind {
            "DELETED" if is_own => self.own.due = true,
            "DELETED" => self.handle_deleted(name),
            _ => {
                let published = self.prefix.read(&metadata.annotations);
                let print = published.print(&metadata.uid);
                if is_own {
                    self.own.due |= self.own.node.as_ref().is_none_or(|node| node.print != print);
                } else if self.nodes.knows(name, print) {
                    self.queue.remove(name);
                } else if published.takes_part() {
                    self.queue.insert(name.into(), metadata.resource_version);
                    self.check_queue(now);
                } else {
                    let standing = Standing::Apart;
                    let (name, created) = (name.into(), metadata.created());
                    self.handle_apart(Seen { name, print, created, standing });
                }
            }
        }
        Ok(())
    }

    /// A node that does not take part, or not any more: there is nothing to read.
    pub(super) fn handle_apart(&mut self, seen: Seen) {
        let name = seen.name.clone();
        self.handle_deleted(&name);
        let outcome = self.nodes.put(seen);
        self.tell_outcome(&name, outcome);
    }

    pub(super) fn watch_refused(&mut self, refusal: &Refusal, now: Instant) {
        self.watch_open = false;
        if refusal.is_expired() {
            info!(
                "the API server has forgotten the changes since the last one that we know: listing again"
            );
            self.list_again(true, Freshness::Cursor, now);
            return;
        }
        let text = self.explain(Job::Watch, refusal);
        let wait = refusal.retry_after.unwrap_or_else(|| self.watch.backoff.failed());
        self.watch.not_before = Some(now + wait);
        self.tell(Job::Watch, text);
    }

    pub(super) fn watch_failed(&mut self, reason: &str, now: Instant) {
        let was_open = std::mem::replace(&mut self.watch_open, false);
        let wait = self.backoff_capped(true);
        self.watch.not_before = Some(now + if was_open { RETRY_FIRST } else { wait });
        self.watch_broken = true;
        self.own.due = true;
        // whether the server is there at all, the reading of our own node will tell
        debug!("{reason}");
    }
}
