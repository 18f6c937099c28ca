//! What the driver has asked for and is not over: done in bounded pieces, in order, and answered when nothing uses any
//! more what it took away.

use core::pin::Pin;
use core::task::Context as TaskContext;
use std::collections::VecDeque;

use viommu::{Completion, EndpointId, Iova, IovaRange, StepError, StepErrorKind};

use super::domains::Kind;
use super::queue::Wait;
use super::registers::Pending;
use super::views::Which;
use super::{Control, Inner, Progress};
use crate::cursor::Cursor;
use crate::log;
use crate::metrics::{add, bump};
use crate::spec::register::Global;

/// Pieces of work in one call.
const PIECES: usize = 16;
/// Extents that one piece of a comparison looks at, about.
const SLICE_EXTENTS: usize = 2048;

/// One thing that is asked for.
#[derive(Debug)]
pub(crate) enum Task {
    /// Contexts may have changed.
    Contexts(Which),
    /// Translation has been switched on or off.
    Switch,
    /// Translations may have changed: of a domain id, or of all.
    Translations { did: Option<u16>, range: IovaRange },
    /// The record of a domain is to be compared with the tables.
    Compare { number: u32, range: IovaRange, spent: u64 },
    /// A device's TLB.
    DeviceTlb { source: u16, pasids: Pasids, range: IovaRange },
}

/// Which address spaces of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pasids {
    /// That of its requests without PASID.
    Without,
    /// That of a PASID.
    One(u32),
    /// Those of all its PASIDs.
    Every,
}

impl Pasids {
    fn has(self, pasid: Option<u32>) -> bool {
        match self {
            Self::Without => pasid.is_none(),
            Self::One(own) => pasid == Some(own),
            Self::Every => pasid.is_some(),
        }
    }
}

/// What the driver sees when it is done.
#[derive(Debug)]
pub(crate) enum After {
    /// Nothing.
    Silence,
    /// The queue goes on; it has been done, though perhaps not all of it is over.
    Descriptor,
    /// As the last, but all in front is over.
    Wait(Wait),
    /// Bits of the global status.
    Global { bits: Global, on: bool },
    /// CCMD or IOTLB reads as done.
    Register(Pending),
}

#[derive(Debug)]
pub(crate) struct Job {
    tasks: VecDeque<Task>,
    after: After,
}

/// In the order in which they were asked for. Bounded: one of each register, and one of the queue.
#[derive(Debug, Default)]
pub(crate) struct Jobs(VecDeque<Job>);

impl Jobs {
    pub(crate) fn push(&mut self, tasks: impl IntoIterator<Item = Task>, after: After) {
        self.0.push_back(Job { tasks: tasks.into_iter().collect(), after });
    }

    /// Compares a domain with its tables, as a part of what is under way.
    pub(crate) fn compare(&mut self, number: u32, range: IovaRange) {
        let task = Task::Compare { number, range, spent: 0 };
        match self.0.front_mut() {
            Some(job) => job.tasks.push_back(task),
            None => self.push([task], After::Silence),
        }
    }
}

impl Jobs {
    /// How many answers are still due.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Control {
    /// Something has been done that is perhaps not over.
    pub(crate) fn done(&mut self, completion: Completion) {
        match &mut self.pending {
            Some(pending) => pending.merge(completion),
            // A thread waits for what was there before: it puts that back on top of this.
            None => self.jobs_done_meanwhile(completion),
        }
    }

    fn jobs_done_meanwhile(&mut self, completion: Completion) {
        let mut all = self.meanwhile.take().unwrap_or_else(Completion::ready);
        all.merge(completion);
        self.meanwhile = Some(all);
    }

    /// Whether all that was done is over.
    fn is_over(&mut self, cx: Option<&mut TaskContext<'_>>) -> bool {
        match (&mut self.pending, cx) {
            (None, _) => false,
            (Some(pending), None) => pending.is_complete(),
            (Some(pending), Some(cx)) => Future::poll(Pin::new(pending), cx).is_ready(),
        }
    }
}

impl Inner {
    pub(super) fn process(&self, control: &mut Control, mut cx: Option<&mut TaskContext<'_>>) -> Progress {
        for _ in 0..PIECES {
            for number in self.wants.take_fresh() {
                control.jobs.compare(number, IovaRange::ALL);
            }
            let Some(job) = control.jobs.0.front_mut() else {
                if self.fetch(control) {
                    continue;
                }
                return Progress::Idle;
            };
            if let Some(task) = job.tasks.pop_front() {
                let mut done = Completion::ready();
                self.run(control, task, &mut done);
                control.done(done);
                continue;
            }
            // A descriptor's work is awaited by the next wait descriptor.
            let needs = !matches!(job.after, After::Silence | After::Descriptor);
            if needs && !control.is_over(cx.as_deref_mut()) {
                return Progress::Waiting;
            }
            if let Some(job) = control.jobs.0.pop_front() {
                self.finish(control, job.after);
            }
        }
        Progress::More
    }

    /// Does all tasks, however many, and those that come of them. No descriptors are fetched, and nobody is answered.
    pub(super) fn run_all(&self, control: &mut Control, tasks: impl IntoIterator<Item = Task>) -> Completion {
        let mut done = Completion::ready();
        control.jobs.push(tasks, After::Silence);
        loop {
            for number in self.wants.take_fresh() {
                control.jobs.compare(number, IovaRange::ALL);
            }
            let Some(job) = control.jobs.0.front_mut() else { return done };
            match job.tasks.pop_front() {
                Some(task) => self.run(control, task, &mut done),
                None => drop(control.jobs.0.pop_front()),
            }
        }
    }

    fn finish(&self, control: &mut Control, after: After) {
        match after {
            After::Silence => {}
            After::Descriptor => control.registers.advance(),
            After::Wait(wait) => {
                self.answer(control, &wait);
                control.registers.advance();
            }
            After::Global { bits, on } => {
                control.registers.answer_command(bits, on);
                self.next_command(control);
            }
            After::Register(pending) => control.registers.answer(pending),
        }
    }

    fn run(&self, control: &mut Control, task: Task, done: &mut Completion) {
        match task {
            Task::Contexts(which) => self.refresh(control, which, done),
            Task::Switch => self.switch(control, done),
            Task::Translations { did, range } => self.invalidate(control, did, range, done),
            Task::Compare { number, range, spent } => self.compare(control, number, range, spent, done),
            Task::DeviceTlb { source, pasids, range } => {
                let is_meant = |id: &&EndpointId| id.requester == u32::from(source) && pasids.has(id.pasid);
                for id in control.members.keys().filter(is_meant) {
                    self.invalidate_device_tlb(*id, range, done);
                }
            }
        }
    }

    fn invalidate_device_tlb(&self, id: EndpointId, range: IovaRange, done: &mut Completion) {
        match self.iommu.endpoint(id).map(|endpoint| endpoint.invalidate_device_tlb(range)) {
            Some(Ok(completion)) => done.merge(completion),
            Some(Err(error)) => {
                log::trouble("a device's TLB could not be told", &error);
                done.merge(error.completion);
            }
            None => {}
        }
    }

    /// IOTLBs forget at once, and records are compared next.
    fn invalidate(&self, control: &mut Control, did: Option<u16>, range: IovaRange, done: &mut Completion) {
        let Control { domains, jobs, .. } = control;
        for (number, space) in &domains.0 {
            match &space.kind {
                Kind::Tables { key, walker } => {
                    if did.is_some_and(|did| did != key.did) {
                        continue;
                    }
                    walker.iotlb.invalidate(range);
                }
                Kind::Endpoint { walker } => {
                    if !walker.invalidate(did, range) {
                        continue;
                    }
                }
            }
            if self.wants.has_mirror(*number) {
                jobs.compare(*number, range);
                continue;
            }
            match space.domain.invalidate(range) {
                Ok(completion) => done.merge(completion),
                Err(StepError { kind: StepErrorKind::WrongKind(_), completion }) => {
                    // A mirror has just come.
                    done.merge(completion);
                    jobs.compare(*number, range);
                }
                Err(error) => {
                    log::trouble("an invalidation was refused", &error.kind);
                    done.merge(error.completion);
                }
            }
        }
    }

    /// One slice of a comparison.
    fn compare(
        &self,
        control: &mut Control,
        number: u32,
        range: IovaRange,
        spent: u64,
        done: &mut Completion,
    ) {
        let Some(space) = control.domains.0.get(&number) else { return };
        let Kind::Tables { walker, .. } = &space.kind else { return };
        let counters = &self.shared.counters;
        if spent > self.config.walk_entries {
            // Whatever is there is not to be seen any more.
            bump(&counters.syncs_cut);
            log::odd("tables go on for too long", spent);
            match space.domain.sync(range, &mut |_, _| None, usize::MAX) {
                Ok(progress) => done.merge(progress.completion),
                Err(error) => done.merge(error.completion),
            }
            return;
        }
        let mut cursor = Cursor::new(&*self.shared.memory, self.shared.abilities.rules, walker.paging());
        let outcome = space.domain.sync(range, &mut cursor, SLICE_EXTENTS);
        bump(&counters.sync_slices);
        add(&counters.sync_entries, cursor.spent);
        let rest = match outcome {
            Ok(progress) => {
                done.merge(progress.completion);
                progress.rest
            }
            Err(error) => {
                done.merge(error.completion);
                match error.kind {
                    StepErrorKind::Cap(_) => {
                        bump(&counters.syncs_capped);
                        log::trouble("the guest's tables have more than the record may", &error.kind);
                    }
                    kind => {
                        bump(&counters.syncs_failed);
                        log::trouble("a comparison with the guest's tables failed", &kind);
                        return;
                    }
                }
                let from = cursor.compared().filter(|from| *from > range.start());
                from.and_then(|from| IovaRange::new(from, range.last()))
            }
        };
        if let Some(range) = rest.filter(|rest| rest.start() < Iova(u64::MAX)) {
            let spent = spent.saturating_add(cursor.spent);
            if let Some(job) = control.jobs.0.front_mut() {
                job.tasks.push_front(Task::Compare { number, range, spent });
            }
        }
    }
}
