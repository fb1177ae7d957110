//! Commands become messages, answers become arrivals.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_hash::Namespace;
use kvbm_proto::{pack_keys, retention_runs, v1};

use super::{Connection, End, Link, LinkParts, watched};
use crate::client::{Committed, PrefetchAnswer, answer, commit_message, prefetch_message, release_message};
use crate::desk::SENDING;
use crate::exchange::{Arrival, Attempt, Command, Note, QuestionId};
use crate::session::{Answer, Question};
use crate::{ClientError, Release};

impl Link {
    /// Sends one command. A daemon that does not read for `detach_after` is as good as gone; the desk keeps the time,
    /// because it knows when this process was stopped meanwhile.
    pub(super) async fn forward(
        &mut self,
        connection: &mut Connection,
        pool_id: u32,
        command: Command,
    ) -> Result<(), End> {
        let Self { parts, hangups, attempt, .. } = self;
        let mut namespaces = std::mem::take(&mut connection.namespaces);
        let mut sender =
            Sender { parts, connection, namespaces: &mut namespaces, pool_id, attempt: *attempt };
        parts.desk.open(*attempt, SENDING, Instant::now(), None, parts.config.detach_after);
        let sent = watched(parts, hangups, *attempt, connection, sender.send(command)).await;
        parts.desk.close(SENDING);
        connection.namespaces = namespaces;
        Ok(sent??)
    }
}

struct Sender<'a> {
    parts: &'a LinkParts,
    connection: &'a Connection,
    namespaces: &'a mut std::collections::HashMap<Namespace, u32>,
    pool_id: u32,
    attempt: Attempt,
}

impl Sender<'_> {
    async fn send(&mut self, command: Command) -> Result<(), ClientError> {
        let pool_id = self.pool_id;
        match command {
            // The attempt is open already.
            Command::Open(_) => {}
            Command::Match { question, namespace, keys, retention, trace } => {
                let refused = |error| Arrival::Matched { question, result: Err(error) };
                let Some(namespace_id) = self.namespace_for(question, namespace, refused).await? else {
                    return Ok(());
                };
                let keys = pack_keys(keys.iter().map(|key| &key.0));
                let retention = retention_runs(&retention);
                let body = Question::Match(v1::Match {
                    namespace_id,
                    keys,
                    pool_id,
                    retention,
                    ..Default::default()
                });
                let of = |answer| answer!(answer, Match);
                let matched = |question, result| Arrival::Matched { question, result };
                self.ask(question, (body, trace), of, matched).await;
            }
            Command::Onboard { question, lease_id, targets, trace } => {
                let targets = targets.into_iter().map(Into::into).collect();
                let body =
                    Question::Onboard(v1::Onboard { lease_id, pool_id, targets, ..Default::default() });
                let of = |answer| answer!(answer, TransferDone);
                let onboarded = |question, result| Arrival::Onboarded { question, result };
                self.ask(question, (body, trace), of, onboarded).await;
            }
            Command::RequestGrants { question, count } => {
                let body = Question::RequestGrants(v1::RequestGrants { pool_id, count });
                let of = |answer| {
                    let grants: v1::Grants = answer!(answer, Grants)?;
                    Ok(grants.blocks.into_iter().map(Into::into).collect())
                };
                let granted = |question, result| Arrival::Granted { question, result };
                self.ask(question, (body, None), of, granted).await;
            }
            Command::Prefetch { question, namespace, keys, trace } => {
                let refused = |error| Arrival::Prefetched { question, result: Err(error) };
                let Some(namespace_id) = self.namespace_for(question, namespace, refused).await? else {
                    return Ok(());
                };
                let body = Question::Prefetch(prefetch_message(namespace_id, &keys, PrefetchAnswer::Arrived));
                let of = |answer| answer!(answer, Prefetch);
                let prefetched = |question, result| Arrival::Prefetched { question, result };
                self.ask(question, (body, trace), of, prefetched).await;
            }
            Command::Notes(notes) => self.notes(notes).await?,
            Command::ReleaseLease(lease_id) => {
                self.tell(Question::ReleaseLease(v1::ReleaseLease { lease_id, ..Default::default() }))
                    .await?;
            }
        }
        Ok(())
    }

    /// Neighbours of one kind and namespace share a message; their order stays.
    async fn notes(&mut self, notes: Vec<Note>) -> Result<(), ClientError> {
        let mut notes = notes.into_iter().peekable();
        while let Some(note) = notes.next() {
            match note {
                Note::Release(release) => {
                    let mut releases = vec![release];
                    while let Some(Note::Release(next)) =
                        notes.next_if(|note| matches!(note, Note::Release(_)))
                    {
                        releases.push(next);
                    }
                    self.release(&releases).await?;
                }
                Note::Commit { block, content, retention } => {
                    let namespace = content.namespace;
                    let (mut blocks, mut contents) = (vec![block.into()], vec![content]);
                    let mut kept = vec![retention];
                    let same = |note: &Note| matches!(note, Note::Commit { content, .. } if content.namespace == namespace);
                    while let Some(Note::Commit { block, content, retention }) = notes.next_if(same) {
                        blocks.push(block.into());
                        contents.push(content);
                        kept.push(retention);
                    }
                    let keys = contents.iter().map(|content| content.key).collect();
                    let parents = contents.iter().map(|content| content.parent).collect();
                    let committed = Committed { blocks, keys, parents, retention: kept };
                    match self.namespace(namespace).await {
                        Ok(id) => {
                            self.tell(Question::Commit(commit_message(id, self.pool_id, committed))).await?;
                        }
                        // The blocks stay private to this engine.
                        Err(ClientError::Refused { refusal, detail }) => {
                            tracing::warn!(?refusal, detail, "the daemon does not take this namespace");
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    async fn release(&self, releases: &[Release]) -> Result<(), ClientError> {
        self.tell(Question::Release(release_message(self.pool_id, releases))).await
    }

    async fn tell(&self, message: Question) -> Result<(), ClientError> {
        self.connection.client.session().tell(message).await
    }

    /// The namespace of a question. When the daemon does not take it, that is the answer to the question.
    async fn namespace_for(
        &mut self,
        question: QuestionId,
        namespace: Namespace,
        refused: impl FnOnce(ClientError) -> Arrival,
    ) -> Result<Option<u32>, ClientError> {
        match self.namespace(namespace).await {
            Ok(namespace_id) => Ok(Some(namespace_id)),
            Err(error @ ClientError::Refused { .. }) => {
                self.answered(question)(refused(error));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn namespace(&mut self, namespace: Namespace) -> Result<u32, ClientError> {
        if let Some(id) = self.namespaces.get(&namespace) {
            return Ok(*id);
        }
        let (tenant, model) = (self.parts.tenant(&namespace), &self.parts.config.model);
        // The desk ends it in time.
        let client = self.connection.client.with_deadline(Duration::MAX);
        let id = client.register_namespace(namespace, self.parts.base, &tenant, model).await?;
        self.namespaces.insert(namespace, id);
        Ok(id)
    }

    /// Asks; the answer goes to the engine from the reader's task, so that arrivals keep the order of the stream.
    async fn ask<T>(
        &self,
        question: QuestionId,
        (body, trace): (Question, Option<v1::TraceContext>),
        of: impl FnOnce(Answer) -> Result<T, ClientError> + Send + 'static,
        arrival: impl FnOnce(QuestionId, Result<T, ClientError>) -> Arrival + Send + 'static,
    ) {
        let answered = self.answered(question);
        let waiter = move |answer: Result<Answer, ClientError>| match answer.and_then(of) {
            // The end of the session says it all.
            Err(ClientError::Unavailable { .. }) => {}
            result => answered(arrival(question, result)),
        };
        self.connection.client.session().ask(body, trace, waiter).await;
    }

    fn answered(&self, question: QuestionId) -> impl FnOnce(Arrival) + Send + 'static {
        let (desk, inbox, attempt) = (Arc::clone(&self.parts.desk), self.parts.inbox.clone(), self.attempt);
        move |arrival| {
            desk.close(question);
            inbox.push(attempt, arrival);
        }
    }
}
