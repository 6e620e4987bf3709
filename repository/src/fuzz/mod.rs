//! A fuzzer for everything that reads stored bytes: whatever they are, nothing panics, nothing runs for long, and no number
//! that they claim makes anybody allocate more than a multiple of them.
//!
//! `samples` makes valid objects of every kind, `mutate` changes them as damage and attackers do, `targets` has one test for
//! each parser, `allocations` counts. Only in tests; the ordinary toolchain runs it.
//!
//! `LIFEBOAT_FUZZ_SECONDS` is how long each target runs (default 2). A failure leaves its input in a file and says how to run
//! it again (`LIFEBOAT_FUZZ_INPUT`).

mod allocations;
mod mutate;
mod samples;
mod targets;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use mutate::Random;

/// What one input may cost in processor time: far more than any needs, in builds without optimisation too.
const MAX_TIME: Duration = Duration::from_secs(5);
const DEFAULT_SECONDS: f64 = 2.0;

/// The most memory that an input may need at a time: `times` its own bytes, and `more`.
#[derive(Debug, Clone, Copy)]
struct Bound {
    times: usize,
    more: usize,
}

/// What most parsers keep to: an item of a few bytes becomes a node of a map or a bitmap at most.
const USUAL: Bound = Bound { times: 64, more: 64 << 10 };

/// Reads mutated samples with `read` for some seconds; `prepare` makes an object of them, with hashes and seals that fit, and
/// is not measured.
fn fuzz<T>(name: &str, bound: Bound, samples: &[Vec<u8>], prepare: impl Fn(&[u8]) -> T, read: impl Fn(&T)) {
    assert!(!samples.is_empty(), "{name}: there are no samples to begin with");
    let most = Cell::new(0);
    let run = |input: &[u8], origin: &str| {
        let prepared = prepare(input);
        let examined = examine(&prepared, input.len(), bound, &read);
        most.set(most.get().max(examined.as_ref().copied().unwrap_or(0)));
        if let Err(what) = examined {
            let file = keep(name, input);
            panic!(
                "{name}: {what} ({} bytes, {origin})\nagain: LIFEBOAT_FUZZ_INPUT={} cargo test -p lifeboat-repository --lib {name}",
                input.len(),
                file.display()
            );
        }
    };
    if let Some(file) = std::env::var_os("LIFEBOAT_FUZZ_INPUT") {
        return run(&std::fs::read(file).unwrap(), "as given");
    }
    for (number, sample) in samples.iter().enumerate() {
        run(sample, &format!("sample {number}"));
    }
    let seconds = std::env::var("LIFEBOAT_FUZZ_SECONDS").map_or(DEFAULT_SECONDS, |text| text.parse().unwrap());
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let first: u64 = rand::random();
    let mut executions = 0u64;
    while Instant::now() < end {
        let seed = first.wrapping_add(executions);
        run(&mutate::mutated(&mut Random::new(seed), samples), &format!("seed {seed}"));
        executions += 1;
    }
    println!("{name}: {executions} inputs, at most {} bytes of memory", most.get());
}

/// The memory that reading an input took, or what is wrong with how it was read.
fn examine<T>(prepared: &T, len: usize, bound: Bound, read: impl Fn(&T)) -> Result<usize, String> {
    let start = processor_time();
    let (outcome, used) = allocations::during(|| catch_unwind(AssertUnwindSafe(|| read(prepared))));
    let time = processor_time().saturating_sub(start);
    let most = bound.times * len + bound.more;
    if outcome.is_err() {
        Err("it panics".to_owned())
    } else if used > most {
        Err(format!("it allocates {used} bytes, more than {most}"))
    } else if time > MAX_TIME {
        Err(format!("it takes {time:?}"))
    } else {
        Ok(used)
    }
}

fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn keep(name: &str, input: &[u8]) -> PathBuf {
    let hash = blake3::hash(input).to_hex();
    let file = std::env::temp_dir().join(format!("lifeboat-{name}-{}.bin", &hash[..12]));
    std::fs::write(&file, input).unwrap();
    file
}

#[test]
fn the_fuzzer_finds_what_it_looks_for() {
    let said = |read: &dyn Fn(&Vec<u8>)| examine(&vec![0u8; 10], 10, Bound { times: 2, more: 1000 }, read);
    assert_eq!(said(&|bytes| drop(bytes.clone())), Ok(10));
    assert!(said(&|_| drop(Vec::<u8>::with_capacity(2000))).unwrap_err().contains("allocates 2000 bytes"));
    assert!(said(&|bytes| assert!(bytes.is_empty())).unwrap_err().contains("panics"));
    // Held at the same time counts, one after the other does not.
    assert_eq!(said(&|_| (0..10).for_each(|_| drop(Vec::<u8>::with_capacity(600)))), Ok(600));
    assert!(said(&|_| drop([600, 600].map(Vec::<u8>::with_capacity))).is_err());
}
