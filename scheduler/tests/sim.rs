//! The simulator: each strategy on small cases made by hand, the account of capacity, and what a seed fixes.

use minipod_scheduler::sim::engine::{self, DecisionTime, Span, Strategy};
use minipod_scheduler::sim::job::{Amounts, Job, SECOND_US, Workload};
use minipod_scheduler::sim::outcome::Outcome;
use minipod_scheduler::sim::strategy::{self, Options};
use minipod_scheduler::sim::workload;
use minipod_scheduler::sim::world::{Happening, Refused, World};

/// A node or unit with so many CPUs, and memory in proportion.
fn cpus(count: i64) -> Amounts {
    Amounts([count * 1000, count * 100, 0])
}

/// A job that comes at a second and runs for some seconds; `count` units of one CPU, of which `min_count` go together.
fn job(at_s: u64, run_s: u64, count: u32, min_count: u32) -> Job {
    let (submit_us, duration_us) = (at_s * SECOND_US, run_s * SECOND_US);
    Job { service: false, submit_us, duration_us, parts: vec![cpus(1)], count, min_count }
}

/// Nodes with one CPU each.
fn case(nodes: usize, jobs: Vec<Job>) -> Workload {
    Workload { name: "case".into(), nodes: vec![cpus(1); nodes], jobs }
}

fn strategy(name: &str, workload: &Workload, options: Options) -> Box<dyn Strategy> {
    strategy::find(name).unwrap()(workload, options)
}

fn until(workload: &Workload, name: &str, options: Options, end_s: u64, seed: u64) -> Outcome {
    let span = Span { end_us: end_s * SECOND_US, stop_when_done: false, stretches: 10 };
    engine::run(workload, strategy(name, workload, options).as_mut(), span, seed)
}

fn deciding(job_ms: u64, unit_ms: u64) -> DecisionTime {
    DecisionTime { job_us: job_ms * 1000, service_us: job_ms * 1000, unit_us: unit_ms * 1000 }
}

#[test]
fn two_hoarders_with_half_of_what_they_need_wait_for_each_other() {
    // Two gangs of four on four nodes: offers go round, so each gets some and none gets all.
    let workload = case(4, vec![job(0, 10, 4, 4), job(0, 10, 4, 4)]);
    let table = [
        // Strategy, jobs finished after 100 s, stuck.
        ("hoard", 0, true),
        ("hoard-timeout", 2, false),
        ("hoard-oldest", 2, false),
        ("atomic-fcfs", 2, false),
        ("atomic-backfill", 2, false),
        ("minipod", 2, false),
        ("opt-fit-all", 2, false),
    ];
    for (name, finished, stuck) in table {
        let options = Options { hoard_timeout_us: 5 * SECOND_US, ..Options::default() };
        let outcome = until(&workload, name, options, 100, 1);
        assert_eq!((outcome.finished, outcome.stuck_since_s.is_some()), (finished, stuck), "{name}: {outcome:?}");
        match name {
            "hoard" => assert!((outcome.shares.held - 1.0).abs() < 1e-9, "{outcome:?}"),
            "hoard-timeout" => assert!(outcome.shares.wasted > 0.0 && outcome.give_backs > 0, "{outcome:?}"),
            _ => assert_eq!((outcome.shares.held, outcome.shares.wasted), (0.0, 0.0), "{name}"),
        }
    }
}

#[test]
fn a_gang_committed_bit_by_bit_is_hoarding() {
    // Two of four nodes come free at 20 and 30 s. A slow scheduler's gang of four takes the other two, a fast one's those.
    let slow = Job { service: true, ..job(1, 10, 4, 4) };
    let workload = case(4, vec![job(0, 20, 1, 1), job(0, 30, 1, 1), slow, job(9, 10, 4, 4)]);
    let time = DecisionTime { service_us: 5 * SECOND_US, ..deciding(100, 0) };
    let options = Options { schedulers: 2, time, ..Options::default() };
    let outcome = until(&workload, "opt-fit-inc", options, 100, 1);
    assert_eq!((outcome.finished, outcome.stuck_since_s), (2, Some(30.2)), "{outcome:?}");
    assert!(outcome.shares.held > 0.7, "{outcome:?}");
    let outcome = until(&workload, "opt-fit-all", options, 100, 1);
    assert_eq!((outcome.finished, outcome.shares.held), (4, 0.0), "{outcome:?}");
}

#[test]
fn conflicts_are_counted_and_decided_on_again() {
    // Two schedulers, one node with room for both units, both decide on the same copy.
    let workload = Workload { nodes: vec![cpus(2)], ..case(0, vec![job(0, 50, 1, 1), job(0, 50, 1, 1)]) };
    let options = Options { schedulers: 2, time: deciding(1000, 0), ..Options::default() };
    let table = [
        // Strategy, transactions with a conflict per job, busy seconds of both schedulers.
        ("opt-fit-all", 0.0, 2.0),
        ("opt-fit-inc", 0.0, 2.0),
        // The first commit changes the node; the second is refused although there is room, and decided on again.
        ("opt-seq-all", 0.5, 3.0),
        ("opt-seq-inc", 0.5, 3.0),
    ];
    for (name, fraction, busy_s) in table {
        let outcome = until(&workload, name, options, 10, 1);
        assert_eq!((outcome.started, outcome.conflict_fraction), (2, fraction), "{name}");
        assert!((outcome.busyness * 2.0 * 10.0 - busy_s).abs() < 1e-9, "{name}: {outcome:?}");
    }
}

#[test]
fn a_conflict_costs_all_or_only_what_conflicts() {
    // Two jobs of three units on four nodes with two CPUs: they meet on a node that both chose last.
    let jobs = vec![job(0, 100, 4, 1), job(0, 100, 4, 1)];
    let workload = Workload { nodes: vec![cpus(2); 4], ..case(0, jobs) };
    let options = Options { schedulers: 2, time: deciding(1000, 0), ..Options::default() };
    let mut conflicts = 0;
    for seed in 0..20 {
        let [all, inc] = ["opt-fit-all", "opt-fit-inc"].map(|name| until(&workload, name, options, 20, seed));
        assert_eq!((all.started, inc.started), (2, 2), "seed {seed}: in the end both have room");
        assert!(all.refused_units >= inc.refused_units, "seed {seed}");
        if inc.refused_units > 0 && inc.refused_units < 4 {
            // A part of the job was kept: deciding was not for nothing. All or nothing loses the whole decision.
            conflicts += 1;
            assert_eq!(inc.decisions_lost, 0.0, "seed {seed}: {inc:?}");
            assert!(all.decisions_lost > 0.0, "seed {seed}: {all:?}");
        }
    }
    assert!(conflicts > 0);
}

#[test]
fn order_decides_who_waits() {
    // Two of four nodes are taken; the next needs four, the last one two for a short time.
    let workload = case(4, vec![job(0, 100, 2, 2), job(1, 10, 4, 4), job(2, 10, 2, 2)]);
    let table = [
        // Strategy, finished after 50 s, finished after 150 s.
        ("atomic-fcfs", 0, 3),
        ("atomic-backfill", 1, 3),
        ("minipod", 1, 3),
        ("opt-fit-all", 1, 3),
        // The second one holds the two free nodes that the third could have used.
        ("hoard-oldest", 0, 3),
    ];
    for (name, early, late) in table {
        let finished = |end_s| until(&workload, name, Options::default(), end_s, 1).finished;
        assert_eq!((finished(50), finished(150)), (early, late), "{name}");
    }
    let held = until(&workload, "hoard-oldest", Options::default(), 50, 1).shares.held;
    assert!((held - 49.0 * 2.0 / 200.0).abs() < 1e-9, "{held}");
}

#[test]
fn a_large_gang_gets_its_turn_with_minipod_and_starves_without_a_hold() {
    // A stream of small jobs keeps both of two nodes busy, never ending together.
    let mut jobs: Vec<Job> = (0..400).map(|at| job(at * 5, 10, 1, 1)).collect();
    jobs.push(Job { submit_us: 12 * SECOND_US, ..job(0, 10, 2, 2) });
    jobs.sort_by_key(|job| job.submit_us);
    let large = jobs.iter().position(|job| job.count == 2).unwrap();
    let workload = case(2, jobs);
    let started = |name: &str| {
        let mut world = World::new(&workload, 1, 1_000 * SECOND_US, 1);
        let mut strategy = strategy(name, &workload, Options::default());
        while let Some(what) = world.next(1_000 * SECOND_US) {
            strategy.happen(what, &mut world);
            world.check().unwrap();
        }
        world.complete_us(large as u32).map(|at| at / SECOND_US)
    };
    assert_eq!(started("atomic-backfill"), None);
    // Held after 30 s, looked at every 30 s, and the last small one ends.
    assert!(started("minipod").is_some_and(|at| at < 12 + 30 + 30 + 15), "{:?}", started("minipod"));
}

#[test]
fn the_two_node_case_is_stuck_only_for_those_who_place_the_parts_alone() {
    let share = |name: &str, pairs: usize| {
        let stuck = (0..100).filter(|seed| {
            let workload = workload::two_node(pairs, *seed);
            let options = Options { hoard_timeout_us: 30 * SECOND_US, ..Options::default() };
            let mut strategy = strategy(name, &workload, options);
            let outcome = engine::run(&workload, strategy.as_mut(), Span::drain(3_600 * SECOND_US), *seed);
            outcome.finished < pairs
        });
        stuck.count()
    };
    // One pair: the offer of Node_A is the first one half of the time.
    assert!((30..70).contains(&share("hoard", 1)), "{}", share("hoard", 1));
    assert!(share("hoard", 3) > 80);
    assert!(share("hoard-oldest", 3) > 30);
    for name in ["minipod", "atomic-fcfs", "atomic-backfill", "opt-fit-all", "opt-seq-inc"] {
        assert_eq!([1, 3].map(|pairs| share(name, pairs)), [0, 0], "{name}");
    }
}

/// Jobs of all kinds: gangs, loose units, pods of two parts, services.
fn medley() -> Workload {
    let mut jobs = workload::lublin::rigid(32, 50, 4).jobs;
    let mixed = workload::mix(32, 50, 4).jobs.into_iter();
    jobs.extend(mixed.map(|job| Job {
        count: job.count.min(20),
        parts: vec![Amounts([200, 50, 0]), Amounts([300, 10, 0])],
        ..job
    }));
    jobs.sort_by_key(|job| job.submit_us);
    Workload { name: "medley".into(), nodes: vec![Amounts([1000, 1024, 0]); 32], jobs }.at_load(0.9)
}

#[test]
fn every_unit_of_capacity_is_accounted_for_at_every_event() {
    let workload = medley();
    let capacity = workload.capacity();
    let end_us = workload.last_submit_us();
    for (name, ..) in strategy::ALL {
        let options = Options { schedulers: 3, time: deciding(500, 20), ..Options::default() };
        let mut world = World::new(&workload, 2, end_us, 10);
        let mut strategy = strategy(name, &workload, options);
        let mut events = 0;
        while let Some(what) = world.next(end_us) {
            strategy.happen(what, &mut world);
            events += 1;
            if events % 16 == 0 {
                world.check().unwrap_or_else(|problem| panic!("{name}: {problem}"));
            }
        }
        let account = world.account();
        for resource in 0..3 {
            let sum =
                account.useful[resource] + account.held[resource] + account.wasted[resource] + account.free[resource];
            let all = i128::from(capacity.0[resource]) * i128::from(end_us);
            assert_eq!(sum, all, "{name}: resource {resource}: {account:?}");
        }
        assert!(account.useful[0] > 0, "{name}");
    }
}

#[test]
fn the_world_refuses_what_is_too_much() {
    let unit = vec![cpus(1), cpus(1)];
    let workload = Workload { nodes: vec![cpus(1), cpus(2)], ..case(0, vec![Job { parts: unit, ..job(0, 5, 2, 2) }]) };
    let mut world = World::new(&workload, 1, 100 * SECOND_US, 1);
    assert_eq!(world.next(0), Some(Happening::Submitted(0)));
    assert_eq!(world.claim_unit(0, 0, 0), Err(Refused::NoRoom));
    assert_eq!(world.claim(0, 0, 0, 1), Ok(()));
    assert_eq!(world.claim(0, 0, 1, 1), Err(Refused::Elsewhere));
    assert_eq!(world.claim(0, 0, 0, 1), Err(Refused::NoRoom));
    assert_eq!(world.claim(0, 0, 0, 2), Err(Refused::NotOpen));
    assert_eq!(world.claim(0, 7, 0, 1), Err(Refused::NotOpen));
    assert_eq!(world.claim(0, 1, 9, 1), Err(Refused::NoRoom));
    assert_eq!(world.claim_unit(0, 1, 1), Ok(()));
    assert!(!world.settle(0), "one of two is whole");
    assert!(world.give_back(0));
    assert_eq!(world.free_total(), workload.capacity());
    assert_eq!(world.check(), Ok(()));
}

#[test]
fn a_seed_fixes_a_run() {
    let workload = medley();
    for (name, ..) in strategy::ALL {
        let figures = |seed| {
            let options = Options { schedulers: 2, time: deciding(500, 20), ..Options::default() };
            let mut strategy = strategy(name, &workload, options);
            let outcome = engine::run(&workload, strategy.as_mut(), Span::arrivals(&workload), seed);
            serde_json::to_string(&outcome).unwrap()
        };
        assert_eq!(figures(1), figures(1), "{name}");
    }
    let random = |seed| {
        let mut strategy = strategy("opt-fit-inc", &workload, Options::default());
        serde_json::to_string(&engine::run(&workload, strategy.as_mut(), Span::arrivals(&workload), seed)).unwrap()
    };
    assert!((2..10).any(|seed| random(seed) != random(1)));
}

#[test]
fn an_unknown_strategy_is_answered_with_those_that_there_are() {
    let problem = strategy::find("mesos").err().unwrap();
    assert!(
        problem.contains("\"mesos\"") && problem.contains("hoard-oldest") && problem.contains("minipod"),
        "{problem}"
    );
}
