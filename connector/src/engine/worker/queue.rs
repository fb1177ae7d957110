//! A bounded queue with one thread that works it off.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

struct Waiting<T> {
    jobs: VecDeque<T>,
    closed: bool,
}

/// Dropping it ends the thread, behind the job that it is at; what waits is dropped.
pub(super) struct Queue<T> {
    inner: Arc<(Mutex<Waiting<T>>, Condvar)>,
    max: usize,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Queue<T> {
    pub fn start(name: &str, max: usize, work: impl Fn(T) + Send + 'static) -> std::io::Result<Self> {
        let inner = Arc::new((Mutex::new(Waiting { jobs: VecDeque::new(), closed: false }), Condvar::new()));
        let worked = inner.clone();
        let run = move || {
            let (waiting, changed) = &*worked;
            loop {
                let mut waiting = waiting.lock();
                while waiting.jobs.is_empty() && !waiting.closed {
                    changed.wait(&mut waiting);
                }
                if waiting.closed {
                    return;
                }
                let job = waiting.jobs.pop_front();
                drop(waiting);
                job.into_iter().for_each(&work);
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self { inner, max, thread: Some(thread) })
    }

    /// Adds a job, or gives it back when there is no room.
    pub fn push(&self, job: T) -> Result<(), T> {
        let (waiting, changed) = &*self.inner;
        let mut waiting = waiting.lock();
        if waiting.jobs.len() >= self.max {
            return Err(job);
        }
        waiting.jobs.push_back(job);
        changed.notify_one();
        Ok(())
    }
}

impl<T> Drop for Queue<T> {
    fn drop(&mut self) {
        let (waiting, changed) = &*self.inner;
        let left = {
            let mut waiting = waiting.lock();
            waiting.closed = true;
            std::mem::take(&mut waiting.jobs)
        };
        changed.notify_all();
        drop(left);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
