//! The watch: every change of every node's metadata, of which nearly all are heart-beats.

use std::time::Instant;

use log::{debug, info};
use prost::bytes::Bytes;

use super::nodes::{Seen, Standing};
use super::request::{Answer, Freshness, Refusal};
use super::stream::Frames;
use super::wire::{self, Metadata, ObjectMeta, Status, WatchEvent};
use super::{Job, Kube, RETRY_FIRST, Subject};
use crate::http::HttpEvent;
use crate::store::Now;

/// A watch that ends before anything is heard is no trouble, unless it goes on like that.
const SILENT: u32 = 3;

impl Kube {
    pub(super) fn handle_watch(&mut self, event: HttpEvent<'_>, now: Now) {
        // it is over, and the loop does not know yet
        if self.cancel_watch {
            return;
        }
        match event {
            HttpEvent::Head { status, headers } => {
                self.watch_answer = Answer::head(status, headers);
                self.frames = Frames::default();
                self.watch_heard = false;
                if self.watch_answer.is_ok() {
                    self.watch_open = true;
                    self.reached();
                    self.done(Subject::Watch);
                }
            }
            HttpEvent::Body(bytes) if !self.watch_answer.is_ok() => self.watch_answer.body(bytes),
            HttpEvent::Body(bytes) => {
                let mut frames = std::mem::take(&mut self.frames);
                let mut take = |frame: &[u8]| {
                    // what is in it is then shared and not copied
                    let frame = Bytes::copy_from_slice(frame);
                    self.handle_frame(&wire::decode(frame)?, now.mono)
                };
                let pushed = frames.push(bytes, &mut take);
                self.frames = frames;
                if let Err(reason) = pushed {
                    self.cancel_watch = true;
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
                self.watch.not_before = Some(now.mono + self.backoff_capped(true));
            }
            HttpEvent::Failed(reason) => {
                self.watch.busy = false;
                self.watch_failed(reason, now.mono);
            }
        }
    }

    fn handle_frame(&mut self, event: &WatchEvent, now: Instant) -> Result<(), String> {
        // what comes after the end of this watch was decided
        if !self.watch_open {
            return Ok(());
        }
        if event.kind == "ERROR" {
            let status: Status = event.object()?;
            let code = u16::try_from(status.code).unwrap_or(500);
            let refusal = Refusal { status: code, message: status.message, retry_after: None };
            self.cancel_watch = true;
            self.watch_refused(&refusal, now);
            return Ok(());
        }
        let metadata = event.object::<Metadata>()?.metadata.unwrap_or_default();
        if !std::mem::replace(&mut self.watch_heard, true) {
            self.watch.backoff.succeeded();
            self.done(Subject::Stream);
        }
        if !metadata.resource_version.is_empty() {
            self.cursor.get_or_insert_default().clone_from(&metadata.resource_version);
        }
        if event.kind == "BOOKMARK" || metadata.name.is_empty() {
            return Ok(());
        }
        let is_deleted = event.kind == "DELETED";
        if metadata.name == self.node_name() {
            self.handle_own_event(&metadata, is_deleted);
        } else if is_deleted {
            self.handle_deleted(&metadata.name, now);
        } else {
            self.handle_node_event(metadata, now);
        }
        Ok(())
    }

    fn handle_own_event(&mut self, metadata: &ObjectMeta, is_deleted: bool) {
        let print = self.prefix.print(&metadata.annotations, &metadata.uid);
        let differs = self.own.node.as_ref().is_none_or(|node| node.print != print);
        // what is being read may be older than this
        let reading = self.task.as_ref().is_some_and(|task| task.job == Job::Own);
        self.own.due |= is_deleted || differs || reading;
        if self.own.node.is_none() {
            self.waits.remove(&Job::Own);
        }
    }

    fn handle_node_event(&mut self, metadata: ObjectMeta, now: Instant) {
        let print = self.prefix.print(&metadata.annotations, &metadata.uid);
        let name = &*metadata.name;
        // what is being read may be older than this
        let reading =
            self.task.as_ref().is_some_and(|task| task.job == Job::Fetch && *task.name == *name);
        if self.nodes.knows(name, print) && !reading && !self.pending.contains_key(name) {
            return;
        }
        if self.prefix.read(&metadata.annotations).takes_part() {
            self.want(name.into(), metadata.resource_version, now);
            self.check_queue(now);
            return;
        }
        // there is nothing to read
        self.handle_deleted(name, now);
        let created = metadata.created();
        let seen = Seen { name: name.into(), print, created, standing: Standing::Apart };
        let outcome = self.nodes.put(seen);
        self.tell_outcome(name, outcome, now);
    }

    fn watch_refused(&mut self, refusal: &Refusal, now: Instant) {
        self.watch_open = false;
        let wait = self.backoff_capped(true);
        let wait = refusal.retry_after.map_or(wait, |asked| asked.max(wait));
        self.watch.not_before = Some(now + wait);
        if refusal.is_expired() {
            info!(
                "the API server has forgotten the changes since the last one that we know: listing again"
            );
            return self.list_again(true, Freshness::Known, now);
        }
        if matches!(refusal.status, 429 | 500..) {
            self.endpoint = (self.endpoint + 1) % self.endpoints.len().max(1);
        }
        let text = self.explain("watch the nodes", "watch nodes", refusal);
        self.tell(Subject::Watch, text);
    }

    fn watch_failed(&mut self, reason: &str, now: Instant) {
        let heard = std::mem::take(&mut self.watch_open) && self.watch_heard;
        let wait = self.backoff_capped(true);
        self.watch.not_before = Some(now + if heard { RETRY_FIRST } else { wait });
        self.watch_broken = true;
        self.own.due = true;
        // whether the server is there at all, the reading of our own node will tell
        if self.watch.backoff.failures() > SILENT {
            self.tell(Subject::Stream, reason.to_owned());
        } else {
            debug!("{reason}");
        }
    }
}
