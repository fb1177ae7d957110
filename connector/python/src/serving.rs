//! Requests of frontends, as Python sees them.

use std::path::PathBuf;
use std::time::Duration;

use kvbm_connector::WorkerRegistration;
use kvbm_connector::serving::{Answer, Event, Serving, ServingOptions};
use kvbm_proto::v1;
use kvbm_proto::v1::generate_event::Body;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// A worker that frontends find in the daemon's registry.
#[pyclass(frozen, module = "kvbm_connector._native")]
pub(crate) struct Worker {
    serving: parking_lot::RwLock<Option<Serving>>,
}

#[pymethods]
impl Worker {
    #[new]
    #[pyo3(signature = (*, worker_id, model, model_path, role, tokens_per_block, context_length, vocab_size, eos_token_ids, socket, daemon, requests_max, base_namespace))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        worker_id: String,
        model: String,
        model_path: String,
        role: String,
        tokens_per_block: u32,
        context_length: u32,
        vocab_size: u32,
        eos_token_ids: Vec<u32>,
        socket: PathBuf,
        daemon: PathBuf,
        requests_max: usize,
        base_namespace: Option<[u8; 32]>,
    ) -> PyResult<Self> {
        crate::engine::log_to_stderr(crate::engine::variable("TLLM_KVBM_LOG"));
        let worker = WorkerRegistration {
            worker_id,
            model,
            model_path,
            role,
            tokens_per_block,
            context_length,
            base_namespace,
            ..WorkerRegistration::default()
        };
        let named = socket.display().to_string();
        let options = ServingOptions { worker, vocab_size, eos_token_ids, socket, daemon, requests_max };
        let serving = Serving::start(options)
            .map_err(|error| PyOSError::new_err(format!("take requests at {named}: {error}")))?;
        Ok(Self { serving: parking_lot::RwLock::new(Some(serving)) })
    }

    /// The next thing to know, within so many seconds: `(number, request)`, where no request means that nobody waits for
    /// its answer any more; or None.
    fn next<'py>(
        &self,
        py: Python<'py>,
        seconds: f64,
    ) -> PyResult<Option<(u64, Option<Bound<'py, PyDict>>)>> {
        let patience = Duration::try_from_secs_f64(seconds)
            .map_err(|error| PyValueError::new_err(format!("seconds: {error}")))?;
        let event = py.detach(|| self.serving.read().as_ref().and_then(|serving| serving.next(patience)));
        match event {
            None => Ok(None),
            Some(Event::Cancelled(number)) => Ok(Some((number, None))),
            Some(Event::Asked(number, request)) => Ok(Some((number, Some(dict_of(py, *request)?)))),
        }
    }

    /// The request has left the queue; so many prompt tokens did not have to be computed.
    fn started(&self, number: u64, device_tokens: u32, host_tokens: u32) -> bool {
        let started = v1::Started { device_tokens, host_tokens, ..v1::Started::default() };
        self.answer(number, Answer::Event(Body::Started(started)))
    }

    /// More tokens. False: nobody listens any more.
    fn tokens(&self, number: u64, ids: Vec<u32>) -> bool {
        self.answer(number, Answer::Event(Body::Tokens(v1::Tokens { ids, ..v1::Tokens::default() })))
    }

    /// The end: `stop`, `length` or `cancelled`.
    fn finished(
        &self,
        number: u64,
        reason: &str,
        prompt_tokens: u32,
        completion_tokens: u32,
    ) -> PyResult<bool> {
        let reason = match reason {
            "stop" => v1::FinishReason::Stop,
            "length" => v1::FinishReason::Length,
            "cancelled" => v1::FinishReason::Cancelled,
            other => return Err(PyValueError::new_err(format!("{other:?} is no reason to finish"))),
        };
        let finished = v1::Finished { reason: reason.into(), prompt_tokens, completion_tokens };
        Ok(self.answer(number, Answer::Event(Body::Finished(finished))))
    }

    /// The request can never be served.
    fn invalid(&self, number: u64, why: String) -> bool {
        self.answer(number, Answer::Invalid(why))
    }

    /// The engine failed.
    fn failed(&self, number: u64, why: String) -> bool {
        self.answer(number, Answer::Failed(why))
    }

    /// No new requests from now on; frontends are told.
    fn drain(&self) -> PyResult<()> {
        let serving = self.serving.read();
        let serving = serving.as_ref().ok_or_else(|| PyRuntimeError::new_err("the worker is closed"))?;
        serving.drain();
        Ok(())
    }

    /// Requests under way.
    #[getter]
    fn running(&self) -> usize {
        self.serving.read().as_ref().map_or(0, Serving::running)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.serving.write().take()));
    }
}

impl Worker {
    fn answer(&self, number: u64, answer: Answer) -> bool {
        self.serving.read().as_ref().is_some_and(|serving| serving.answer(number, answer))
    }
}

/// The fields by their names on the wire; what is absent is None.
fn dict_of(py: Python<'_>, request: v1::GenerateRequest) -> PyResult<Bound<'_, PyDict>> {
    let named = PyDict::new(py);
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    let sampling = request.sampling.unwrap_or_default();
    named.set_item("request_id", request.request_id)?;
    named.set_item("prompt", request.prompt)?;
    named.set_item("generated", request.generated)?;
    named.set_item("temperature", sampling.temperature)?;
    named.set_item("seed", sampling.seed)?;
    named.set_item("top_p", sampling.top_p)?;
    named.set_item("top_k", sampling.top_k)?;
    named.set_item("min_p", sampling.min_p)?;
    named.set_item("repetition_penalty", sampling.repetition_penalty)?;
    named.set_item("presence_penalty", sampling.presence_penalty)?;
    named.set_item("frequency_penalty", sampling.frequency_penalty)?;
    named.set_item("min_tokens", sampling.min_tokens)?;
    // What the adapter has no translation for, to be refused by its name.
    let untranslated = [
        ("logit_bias", !sampling.logit_bias.is_empty()),
        ("logprobs", sampling.logprobs.is_some()),
        ("echo with logprobs", sampling.prompt_logprobs.is_some()),
        ("guided decoding", request.guide.is_some()),
    ];
    let untranslated = untranslated.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name);
    named.set_item("untranslated", untranslated.collect::<Vec<_>>())?;
    named.set_item("max_tokens", request.max_tokens)?;
    named.set_item("ignore_eos", request.ignore_eos)?;
    named.set_item("stop_token_ids", request.stop_token_ids)?;
    named.set_item("cache_salt", text(request.cache_salt))?;
    named.set_item("lora", text(request.lora))?;
    named.set_item("tenant", text(request.tenant))?;
    named.set_item("dp_rank", request.dp_rank)?;
    let processors = request.logits_processors.into_iter();
    let processors: Vec<(String, String)> =
        processors.map(|processor| (processor.name, processor.arguments)).collect();
    named.set_item("logits_processors", processors)?;
    let inputs = request.multimodal.into_iter();
    let inputs: Vec<(String, String)> = inputs.map(|input| (input.modality, input.url)).collect();
    named.set_item("multimodal", inputs)?;
    let retention = request.retention.map(|retention| retention_of(py, retention)).transpose()?;
    named.set_item("retention", retention)?;
    Ok(named)
}

/// `ranges`: `(token_start, token_end, priority, duration_ms)`; and what holds for generated tokens.
fn retention_of(py: Python<'_>, retention: v1::Retention) -> PyResult<Bound<'_, PyDict>> {
    let named = PyDict::new(py);
    let ranges = retention.token_range_retention_configs.into_iter();
    let ranges: Vec<_> =
        ranges.map(|range| (range.token_start, range.token_end, range.priority, range.duration_ms)).collect();
    named.set_item("ranges", ranges)?;
    named.set_item("decode_retention_priority", retention.decode_retention_priority)?;
    named.set_item("decode_duration_ms", retention.decode_duration_ms)?;
    Ok(named)
}
