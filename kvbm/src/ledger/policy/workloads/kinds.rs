//! What the kinds of traffic look like.

use super::Request;
use super::generator::{Generator, Prompt, Zipf};

/// The first `count` requests in order of time, of sessions that begin in order of time.
///
/// `begin` is asked for the next session's start and requests. A session's request cannot be among the first before
/// all sessions that begin earlier are known.
fn merged(count: usize, mut begin: impl FnMut() -> (u64, Vec<Request>)) -> Vec<Request> {
    let mut requests = Vec::new();
    loop {
        let (start_ms, session) = begin();
        requests.extend(session);
        if requests.len() >= 2 * count {
            requests.sort_by_key(|request| request.at_ms);
            if requests[count].at_ms <= start_ms {
                requests.truncate(count);
                return requests;
            }
        }
    }
}

/// Conversations: see [`WorkloadKind::Chat`](super::WorkloadKind::Chat).
pub fn chat(generator: &mut Generator, count: usize) -> Vec<Request> {
    let systems = Zipf::new(12, 1.2);
    let mut start_ms = 0;
    merged(count, || {
        start_ms += generator.wait_ms(600.0);
        let mut prompt = Prompt::default();
        let system = systems.draw(generator);
        prompt.add(system, 2 + system % 5);
        let mut at_ms = start_ms;
        let mut session = Vec::new();
        // Who came back once is likelier to come back again.
        let mut stays = 0.35;
        loop {
            let text = generator.next();
            prompt.add(text, 1 + generator.wait_ms(7.0));
            session.push(Request { at_ms, blocks: prompt.blocks.clone() });
            if generator.share() > stays || prompt.blocks.len() > 400 {
                return (start_ms, session);
            }
            stays = (stays + 0.15_f64).min(0.85);
            let answer = generator.next();
            prompt.add(answer, generator.within(1, 3));
            at_ms += 4_000 + generator.think_ms(70_000.0, 1.0);
        }
    })
}

/// Agents: see [`WorkloadKind::Agents`](super::WorkloadKind::Agents).
pub fn agents(generator: &mut Generator, count: usize) -> Vec<Request> {
    let tools = Zipf::new(6, 1.0);
    let mut start_ms = 0;
    merged(count, || {
        start_ms += generator.wait_ms(8_000.0);
        let mut prompt = Prompt::default();
        let tool = tools.draw(generator);
        prompt.add(tool, 6 + tool);
        let task = generator.next();
        prompt.add(task, generator.within(1, 12));
        let mut at_ms = start_ms;
        let mut session = Vec::new();
        for _ in 0..generator.within(3, 40) {
            session.push(Request { at_ms, blocks: prompt.blocks.clone() });
            if generator.share() < 0.05 {
                let kept = prompt.blocks.len() * 2 / 3;
                prompt.blocks.truncate(kept.max(1));
            }
            let result = generator.next();
            prompt.add(result, 1 + generator.wait_ms(3.0));
            // Mostly a tool that is quick, now and then a build, or a person who is asked.
            at_ms += match generator.within(0, 19) {
                0 => generator.think_ms(240_000.0, 0.7),
                1 | 2 => generator.think_ms(40_000.0, 0.5),
                _ => generator.think_ms(5_000.0, 0.6),
            };
        }
        (start_ms, session)
    })
}

/// Questions about documents: see [`WorkloadKind::Rag`](super::WorkloadKind::Rag).
pub fn rag(generator: &mut Generator, count: usize) -> Vec<Request> {
    let documents = Zipf::new(4_000, 0.9);
    let mut at_ms = 0;
    let requests = (0..count).map(|_| {
        at_ms += generator.wait_ms(300.0);
        let mut prompt = Prompt::default();
        prompt.add(1, 2);
        for _ in 0..1 + generator.within(0, 3) / 3 {
            let document = documents.draw(generator);
            prompt.add(100 + document, 4 + (document * 7919) % 29);
        }
        let question = generator.next();
        prompt.add(question, generator.within(1, 2));
        Request { at_ms, blocks: prompt.blocks }
    });
    requests.collect()
}

/// Scans through a hot set: see [`WorkloadKind::Scans`](super::WorkloadKind::Scans).
pub fn scans(generator: &mut Generator, count: usize) -> Vec<Request> {
    let hot = Zipf::new(500, 0.7);
    let mut at_ms = 0;
    let requests = (0..count).map(|_| {
        at_ms += generator.wait_ms(400.0);
        let mut prompt = Prompt::default();
        if generator.share() < 0.4 {
            let document = generator.next();
            prompt.add(document, generator.within(16, 128));
        } else {
            let which = hot.draw(generator);
            prompt.add(which, 4 + (which * 31) % 13);
            let question = generator.next();
            prompt.add(question, 1);
        }
        Request { at_ms, blocks: prompt.blocks }
    });
    requests.collect()
}
