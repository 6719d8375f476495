//! The unary lane: one exchange at a time, and what its answer means.

use std::time::Duration;

use log::info;

use super::listing::Listing;
use super::nodes::Seen;
use super::own::OwnNode;
use super::request::Answer;
use super::stream::{Items, Part};
use super::wire::{self, ListMeta, Pod};
use super::{Job, Kube, Who};
use crate::http::{HttpEvent, Request};
use crate::store::{Lane, Now, StoreRequest};

/// The exchange under way on the unary lane.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) job: Job,
    pub(super) answer: Answer,
    /// For answers that are lists.
    pub(super) items: Option<Items>,
    /// What is wrong with the answer.
    pub(super) broken: Option<String>,
    /// Our own node, as read.
    pub(super) own: Option<OwnNode>,
    /// Another node, as read.
    pub(super) node: Option<Seen>,
    /// The node that is read, and whether it was deleted meanwhile.
    pub(super) name: Box<str>,
    pub(super) outdated: bool,
    /// The answer's version.
    pub(super) version: String,
    /// What was known when the request was made.
    pub(super) cursor: Option<String>,
}

impl Kube {
    /// Begins what [`Kube::next_task`] says.
    pub(super) fn start(&mut self, job: Job, request: Request) -> StoreRequest {
        let mut name: Box<str> = Box::default();
        if job == Job::Fetch
            && let Some((next, _)) = self.next_wanted()
        {
            name = next.into();
            self.queue.remove(&name);
            self.read_last.clone_from(&name);
        }
        // what happens from now on is not in the answer
        self.own.due &= job != Job::Own;
        if let Some(listing) = self.listing.as_mut().filter(|_| job == Job::List)
            && listing.next.is_empty()
        {
            *listing = Listing::new(listing.metadata_only, listing.freshness);
        }
        let lists = matches!(job, Job::Own | Job::List | Job::Fetch);
        self.task = Some(Task {
            job,
            answer: Answer::default(),
            items: lists.then(Items::new),
            broken: None,
            own: None,
            node: None,
            name,
            outdated: false,
            version: String::new(),
            cursor: self.cursor.clone(),
        });
        self.unary.busy = true;
        StoreRequest::Start(Lane::Unary, request)
    }

    pub(super) fn handle_unary(&mut self, event: HttpEvent<'_>, now: Now) {
        // nobody waits for it any more
        let Some(mut task) = self.task.take() else { return };
        match event {
            HttpEvent::Head { status, headers } => task.answer = Answer::head(status, headers),
            HttpEvent::Body(bytes) => {
                let items = task.items.take();
                match items.filter(|_| task.answer.is_ok()) {
                    None => task.answer.body(bytes),
                    Some(mut items) => {
                        if task.broken.is_none() {
                            let mut take = |part: Part<'_>| self.handle_part(&mut task, &part);
                            task.broken = items.push(bytes, &mut take).err();
                        }
                        task.items = Some(items);
                    }
                }
            }
            HttpEvent::Done => {
                self.unary.busy = false;
                return self.handle_done(task, now);
            }
            HttpEvent::Failed(reason) => {
                self.unary.busy = false;
                self.put_back(task);
                return self.away(reason, now.mono);
            }
        }
        self.task = Some(task);
    }

    /// What was to be read is still to be read.
    pub(super) fn put_back(&mut self, task: Task) {
        match (task.job, &mut self.listing) {
            (Job::Own, _) => self.own.due = true,
            (Job::Fetch, _) if !task.outdated => drop(self.queue.entry(task.name).or_default()),
            (Job::List, Some(listing)) => listing.next.clear(),
            _ => {}
        }
    }

    pub(super) fn handle_part(&mut self, task: &mut Task, part: &Part<'_>) -> Result<(), String> {
        match (task.job, part) {
            (_, Part::Meta(bytes)) => {
                let meta: ListMeta = wire::decode(*bytes)?;
                if let (Job::List, Some(listing)) = (task.job, &mut self.listing) {
                    listing.next.clone_from(&meta.next);
                    // the first page's: what has changed since then comes with the watch
                    if listing.version.is_empty() {
                        listing.version.clone_from(&meta.resource_version);
                    }
                }
                task.version = meta.resource_version;
            }
            (Job::Own, Part::Item(bytes)) => task.own = Some(OwnNode::read(self, bytes)?),
            (Job::Fetch, Part::Item(bytes)) => {
                task.node = Some(Seen::new(wire::decode(*bytes)?, &self.prefix, &self.config));
            }
            (_, Part::Item(bytes)) => return self.handle_listed(bytes),
        }
        Ok(())
    }

    pub(super) fn handle_done(&mut self, mut task: Task, now: Now) {
        let job = task.job;
        if !task.answer.is_ok() {
            let refusal = task.answer.refusal();
            self.put_back(task);
            return self.refused(job, &refusal, now.mono);
        }
        let finished = task.items.as_ref().map_or(Ok(()), Items::finish);
        if let Some(reason) = task.broken.take().or(finished.err()) {
            self.put_back(task);
            let reason = format!("{}: {reason}", self.called(job));
            return self.away(&reason, now.mono);
        }
        self.reached();
        if let Some(backoff) = self.backoffs.get_mut(&job).filter(|_| job != Job::Publish) {
            backoff.succeeded();
        }
        match job {
            Job::Name => match wire::open::<Pod>(&*task.answer.body).map(Pod::node) {
                Ok(Some(node)) => {
                    info!("this is node {node}");
                    self.done(job);
                    self.who = Who::Node(node);
                }
                Ok(None) => {
                    self.wait(job, "our pod is on no node yet".into(), Duration::ZERO, now.mono);
                }
                Err(reason) => self.wait(job, reason, Duration::ZERO, now.mono),
            },
            Job::Own => {
                self.notice_setback(&task, now.mono);
                self.watch_broken = false;
                self.handle_own(task.own, now);
                self.begin_list(now.mono);
            }
            Job::Publish => {
                self.handle_published(wire::open(&*task.answer.body), now.mono);
                self.begin_list(now.mono);
            }
            Job::Condition => {
                self.done(job);
                if let Some(node) = &mut self.own.node {
                    node.has_network = true;
                }
            }
            Job::Fetch => {
                self.done(job);
                self.handle_fetched(task, now.mono);
            }
            Job::List => self.handle_page(now.mono),
        }
    }
}
