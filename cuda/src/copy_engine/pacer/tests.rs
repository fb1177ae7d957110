//! The pacer against a model of an engine whose steps get longer in proportion to the rate of copies.

use proptest::prelude::*;

use super::*;

/// How finely the model divides time.
const SLICE: Duration = Duration::from_micros(500);

/// An engine that decodes all the time, and a link on which there is always something to copy.
struct Model {
    pacer: Pacer,
    now: Duration,
    sample: StepSample,
    /// Part of the current step that is done, and when it began.
    done: f64,
    began: Duration,
    /// Length of a step without copies, seconds.
    step: f64,
    /// By how much a step gets longer each time, as a part of it.
    drift: f64,
    /// Slowdown for each byte per second.
    factor: f64,
    /// Steps vary by this part.
    noise: f64,
    random: u64,
    copied: u64,
    /// What all steps would have taken without copies.
    ideal: f64,
    step_now: f64,
}

impl Model {
    fn new(config: PacerConfig, step: f64, factor: f64, noise: f64, seed: u64) -> Self {
        Self {
            pacer: Pacer::new(config),
            now: Duration::from_secs(1),
            sample: StepSample { begun: 1, ..StepSample::default() },
            done: 0.0,
            began: Duration::from_secs(1),
            step,
            drift: 0.0,
            factor,
            noise,
            random: seed | 1,
            copied: 0,
            ideal: 0.0,
            step_now: step,
        }
    }

    /// From -1 to 1.
    fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    fn slice(&mut self, block: u64) {
        self.pacer.observe(self.now, Some(self.sample));
        let link = (self.pacer.config.link_bytes_per_second * SLICE.as_secs_f64()) as u64;
        let bytes = match self.pacer.allowance() {
            Allowance::Unlimited => link,
            Allowance::Bytes(bytes) => bytes.div_ceil(block) * block,
        };
        self.pacer.spend(bytes);
        self.copied += bytes;
        let rate = bytes as f64 / SLICE.as_secs_f64();
        self.now += SLICE;
        self.done += SLICE.as_secs_f64() / (self.step_now * (1.0 + self.factor * rate));
        if self.done >= 1.0 {
            self.done -= 1.0;
            self.ideal += self.step_now;
            self.sample.begun += 1;
            self.sample.ended += 1;
            self.sample.decodes += 1;
            self.sample.decode_time += self.now - self.began;
            self.began = self.now;
            self.step *= 1.0 + self.drift;
            self.step_now = self.step * (1.0 + self.noise * self.random());
        }
    }

    /// Goes on for so long. Returns by how much steps were longer than without copies, and bytes per second copied.
    fn run(&mut self, time: Duration, block: u64) -> (f64, f64) {
        let (copied, ideal, decoded) = (self.copied, self.ideal, self.sample.decode_time);
        let end = self.now + time;
        while self.now < end {
            self.slice(block);
        }
        let took = (self.sample.decode_time - decoded).as_secs_f64();
        (took / (self.ideal - ideal) - 1.0, (self.copied - copied) as f64 / time.as_secs_f64())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever copies cost, decoding suffers no more than its share, and most of what the share allows is used.
    #[test]
    fn decoding_suffers_its_share_and_no_more(
        step_ms in 3.0f64..40.0,
        // Slowdown at the full rate of the link, from hardly any to a doubling.
        at_full_rate in 0.005f64..1.0,
        share in 0.02f64..0.08,
        block_kib in prop::sample::select(vec![64u64, 256, 2048, 4096]),
        seed: u64,
    ) {
        let config = PacerConfig { slowdown_share: share, ..PacerConfig::default() };
        let link = config.link_bytes_per_second;
        let factor = at_full_rate / link;
        let mut model = Model::new(config, step_ms / 1e3, factor, 0.01, seed);
        model.drift = 1e-5;
        model.run(Duration::from_secs(30), block_kib << 10);
        let (slowdown, rate) = model.run(Duration::from_secs(40), block_kib << 10);
        prop_assert!(slowdown <= share, "steps are {slowdown:.4} longer, {share:.4} allowed");
        let possible = (share / factor).min(link);
        prop_assert!(rate >= 0.5 * possible, "{:.2} of {:.2} GB/s", rate / 1e9, possible / 1e9);
    }
}

#[test]
fn an_idle_engine_is_not_spared_and_a_long_pass_is_not_idleness() {
    let mut pacer = Pacer::new(PacerConfig::default());
    let at = Duration::from_millis;
    let idle = StepSample { begun: 5, ended: 5, decodes: 5, decode_time: at(50) };
    pacer.observe(at(100), Some(idle));
    assert_eq!(pacer.allowance(), Allowance::Bytes(0), "it may just be between two passes");
    pacer.observe(at(121), Some(idle));
    assert_eq!((pacer.allowance(), pacer.rate()), (Allowance::Unlimited, None));
    pacer.spend(1 << 40);
    let prefill = StepSample { begun: 6, ..idle };
    for ms in 122..2_000 {
        pacer.observe(at(ms), Some(prefill));
        assert_ne!(pacer.allowance(), Allowance::Unlimited, "at {ms} ms");
    }
    // What was copied while it was idle is no debt, and the rest was broken off.
    assert!(!pacer.allowance().is_exhausted());
}

#[test]
fn without_a_word_from_the_engine_a_fixed_share_of_the_link_is_used() {
    let config = PacerConfig { blind_share: 0.1, link_bytes_per_second: 50e9, ..PacerConfig::default() };
    let mut pacer = Pacer::new(config);
    let mut copied = 0;
    for ms in 1..=1_000 {
        pacer.observe(Duration::from_millis(ms), None);
        if let Allowance::Bytes(bytes) = pacer.allowance() {
            copied += bytes;
            pacer.spend(bytes);
        }
    }
    assert!((4.9e9..=5.0e9).contains(&(copied as f64)), "{copied}");
}

#[test]
fn a_share_of_nothing_waits_for_idleness() {
    let config = PacerConfig { slowdown_share: 0.0, ..PacerConfig::default() };
    let mut model = Model::new(config, 0.01, 1e-12, 0.0, 1);
    assert_eq!(model.run(Duration::from_secs(5), 65_536).1, 0.0);
    let ended = StepSample { ended: model.sample.begun, ..model.sample };
    model.pacer.observe(model.now, Some(ended));
    model.pacer.observe(model.now + Duration::from_millis(30), Some(ended));
    assert_eq!(model.pacer.allowance(), Allowance::Unlimited);
}

#[test]
fn a_new_engine_and_steps_that_are_not_comparable_teach_nothing() {
    let mut model = Model::new(PacerConfig::default(), 0.01, 2e-12, 0.0, 1);
    model.run(Duration::from_secs(10), 65_536);
    let learnt = model.pacer.expected_slowdown().unwrap();
    // Its steps take five times as long, at once.
    model.step *= 5.0;
    model.sample = StepSample { begun: 1, ..StepSample::default() };
    model.run(Duration::from_secs(10), 65_536);
    let later = model.pacer.expected_slowdown().unwrap();
    assert!((learnt - later).abs() < 0.01, "{learnt} and then {later}");
}

#[test]
fn when_there_is_little_to_copy_no_step_is_spent_on_resting() {
    let mut pacer = Pacer::new(PacerConfig::default());
    let mut sample = StepSample::default();
    let mut rests = 0;
    for step in 0..1_000u64 {
        sample = StepSample {
            begun: step + 1,
            ended: step,
            decodes: step,
            decode_time: sample.decode_time + Duration::from_millis(10),
        };
        pacer.observe(Duration::from_millis(10 * step), Some(sample));
        rests += u64::from(pacer.is_resting());
        pacer.spend(1_000);
    }
    assert!(rests <= 2 * (REST_STEPS + SKIPPED_STEPS), "{rests} steps rested");
}

#[test]
fn the_strictest_engine_decides() {
    let (a, b) = (Allowance::Bytes(5), Allowance::Bytes(7));
    assert_eq!((a.smaller(b), b.smaller(a)), (a, a));
    assert_eq!((Allowance::Unlimited.smaller(b), b.smaller(Allowance::Unlimited)), (b, b));
    assert_eq!((b.less(9), Allowance::Unlimited.less(9)), (Allowance::Bytes(0), Allowance::Unlimited));
}
