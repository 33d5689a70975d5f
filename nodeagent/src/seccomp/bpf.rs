//! From rules to the kernel's filter: classic BPF over `struct seccomp_data` (seccomp(2)).
//!
//! System calls are numbers, and neighbours mostly have the same answer. So the numbers fall into ranges, and the filter is a
//! binary tree over the ranges: about eight comparisons a call, where a list as others make it has hundreds.
//!
//! The program is written backwards: a BPF jump only goes forward, so its target is known when the jump is written.

use std::collections::BTreeMap;

/// Most instructions that the kernel takes (BPF_MAXINSNS).
const MAX_INSTRUCTIONS: usize = 4096;
/// A conditional jump reaches 255; two are kept for the jumps that it may need itself.
const REACH: usize = 253;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const IF_NOT_LESS: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// What becomes of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The process ends as by SIGSYS.
    KillProcess,
    /// The calling thread does.
    KillThread,
    /// SIGSYS, which a handler can take.
    Trap,
    /// It is not made and answers this error number.
    Errno(u16),
    /// The tracer decides; without one it answers ENOSYS.
    Trace(u16),
    /// It is made, and logged.
    Log,
    /// It is made.
    Allow,
}

impl Action {
    fn value(self) -> u32 {
        match self {
            Self::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
            Self::KillThread => libc::SECCOMP_RET_KILL_THREAD,
            Self::Trap => libc::SECCOMP_RET_TRAP,
            Self::Errno(errno) => libc::SECCOMP_RET_ERRNO | u32::from(errno),
            Self::Trace(data) => libc::SECCOMP_RET_TRACE | u32::from(data),
            Self::Log => libc::SECCOMP_RET_LOG,
            Self::Allow => libc::SECCOMP_RET_ALLOW,
        }
    }
}

/// How an argument is compared; unsigned, 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Is {
    /// The value itself.
    Equal,
    /// Anything else.
    NotEqual,
    /// Less than the value.
    Less,
    /// At most the value.
    NotGreater,
    /// More than the value.
    Greater,
    /// At least the value.
    NotLess,
    /// The value, once it is masked with this.
    EqualUnder(u64),
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// Which, 0 to 5.
    pub argument: u8,
    /// How.
    pub is: Is,
    /// With what.
    pub value: u64,
}

/// What becomes of a call when all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// None: always.
    pub conditions: Vec<Condition>,
    /// The answer.
    pub action: Action,
}

/// All rules for one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// `AUDIT_ARCH_…`.
    pub architecture: u32,
    /// By number; the first rule that holds decides.
    pub calls: BTreeMap<u32, Vec<Rule>>,
    /// Where none holds.
    pub otherwise: Action,
    /// The highest number that we have a name for.
    pub newest: u32,
    /// For higher numbers.
    pub unknown: Action,
}

/// The filter does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the profile needs {0} instructions, the kernel takes {MAX_INSTRUCTIONS}")]
pub struct TooLong(pub usize);

/// The filter as an array of `struct sock_filter`; `foreign` is for architectures without a table.
///
/// # Errors
/// When the kernel would not take it.
pub fn compile(tables: &[Table], foreign: Action) -> Result<Vec<u8>, TooLong> {
    let mut code = Code::default();
    let entries: Vec<(u32, Label)> = tables.iter().map(|table| (table.architecture, code.table(table))).collect();
    let mut otherwise = code.give(foreign);
    for (architecture, entry) in entries.into_iter().rev() {
        otherwise = code.branch(IF_EQUAL, architecture, entry, otherwise);
    }
    code.push(LOAD, 0, 0, ARCHITECTURE);
    code.finish()
}

/// An instruction by its distance from the program's end, itself included.
type Label = usize;

/// The program, its last instruction first. Every piece ends in jumps or an answer, so pieces can stand anywhere.
#[derive(Default)]
struct Code {
    backwards: Vec<[u8; 8]>,
    /// The newest place of each answer.
    answers: Vec<(Action, Label)>,
}

/// Numbers from `first` to the next range's.
struct Range<'a> {
    first: u32,
    rules: &'a [Rule],
}

impl Code {
    fn push(&mut self, code: u16, yes: u8, no: u8, k: u32) -> Label {
        let ([c0, c1], [k0, k1, k2, k3]) = (code.to_ne_bytes(), k.to_ne_bytes());
        self.backwards.push([c0, c1, yes, no, k0, k1, k2, k3]);
        self.backwards.len()
    }

    /// Instructions between the next one to be pushed and the target.
    fn distance(&self, target: Label) -> usize {
        self.backwards.len() - target
    }

    fn give(&mut self, action: Action) -> Label {
        let known = self.answers.iter().rposition(|(other, _)| *other == action);
        if let Some(at) = known {
            let label = self.answers[at].1;
            if self.distance(label) < REACH / 2 {
                return label;
            }
            self.answers.remove(at);
        }
        let label = self.push(RETURN, 0, 0, action.value());
        self.answers.push((action, label));
        label
    }

    /// A place within reach that leads there.
    fn near(&mut self, target: Label) -> Label {
        let distance = self.distance(target);
        if distance <= REACH {
            return target;
        }
        // Never longer than the program, which is bounded.
        self.push(JUMP, 0, 0, u32::try_from(distance).unwrap_or(u32::MAX))
    }

    fn branch(&mut self, code: u16, k: u32, yes: Label, no: Label) -> Label {
        if yes == no {
            return yes;
        }
        let (yes, no) = (self.near(yes), self.near(no));
        let reach = |code: &Self, target| u8::try_from(code.distance(target)).unwrap_or(u8::MAX);
        let (yes, no) = (reach(self, yes), reach(self, no));
        self.push(code, yes, no, k)
    }

    fn table(&mut self, table: &Table) -> Label {
        let otherwise = [Rule { conditions: Vec::new(), action: table.otherwise }];
        let unknown = [Rule { conditions: Vec::new(), action: table.unknown }];
        let mut ranges: Vec<Range<'_>> = vec![Range { first: 0, rules: &otherwise }];
        for (&number, rules) in &table.calls {
            begin(&mut ranges, number, rules);
            begin(&mut ranges, number + 1, &otherwise);
        }
        begin(&mut ranges, table.newest + 1, &unknown);
        let root = self.tree(&ranges, table.otherwise);
        // The load of the number is followed by the tree, wherever its root stands.
        let distance = self.distance(root);
        if distance > 0 {
            self.push(JUMP, 0, 0, u32::try_from(distance).unwrap_or(u32::MAX));
        }
        self.push(LOAD, 0, 0, NUMBER)
    }

    fn tree(&mut self, ranges: &[Range<'_>], otherwise: Action) -> Label {
        match ranges {
            [] => self.give(otherwise),
            [one] => self.rules(one.rules, otherwise),
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                let first = high[0].first;
                let (high, low) = (self.tree(high, otherwise), self.tree(low, otherwise));
                self.branch(IF_NOT_LESS, first, high, low)
            }
        }
    }

    fn rules(&mut self, rules: &[Rule], otherwise: Action) -> Label {
        let certain = rules.iter().position(|rule| rule.conditions.is_empty());
        let mut next = match certain {
            Some(at) => self.give(rules[at].action),
            None => self.give(otherwise),
        };
        for rule in rules[..certain.unwrap_or(rules.len())].iter().rev() {
            let fails = next;
            next = self.give(rule.action);
            for condition in rule.conditions.iter().rev() {
                next = self.condition(*condition, next, fails);
            }
        }
        next
    }

    /// Arguments are compared in halves, the only size that BPF has.
    fn condition(&mut self, condition: Condition, yes: Label, no: Label) -> Label {
        if yes == no {
            return yes;
        }
        let Condition { argument, is, value } = condition;
        // Little endian, as both architectures are that there are tables for.
        let low = ARGUMENTS + 8 * u32::from(argument);
        let high = low + 4;
        #[allow(clippy::cast_possible_truncation)]
        let halves = |value: u64| (value as u32, (value >> 32) as u32);
        let (low_value, high_value) = halves(value);
        match is {
            Is::NotEqual => self.condition(Condition { is: Is::Equal, ..condition }, no, yes),
            Is::Less => self.condition(Condition { is: Is::NotLess, ..condition }, no, yes),
            Is::NotGreater => self.condition(Condition { is: Is::Greater, ..condition }, no, yes),
            Is::Equal => {
                self.branch(IF_EQUAL, low_value, yes, no);
                let rest = self.push(LOAD, 0, 0, low);
                self.branch(IF_EQUAL, high_value, rest, no);
                self.push(LOAD, 0, 0, high)
            }
            Is::EqualUnder(mask) => {
                let (low_mask, high_mask) = halves(mask);
                self.branch(IF_EQUAL, low_value, yes, no);
                self.push(AND, 0, 0, low_mask);
                let rest = self.push(LOAD, 0, 0, low);
                self.branch(IF_EQUAL, high_value, rest, no);
                self.push(AND, 0, 0, high_mask);
                self.push(LOAD, 0, 0, high)
            }
            Is::Greater | Is::NotLess => {
                let code = if is == Is::Greater { IF_GREATER } else { IF_NOT_LESS };
                self.branch(code, low_value, yes, no);
                let rest = self.push(LOAD, 0, 0, low);
                let same = self.branch(IF_EQUAL, high_value, rest, no);
                self.branch(IF_GREATER, high_value, yes, same);
                self.push(LOAD, 0, 0, high)
            }
        }
    }

    fn finish(self) -> Result<Vec<u8>, TooLong> {
        if self.backwards.len() > MAX_INSTRUCTIONS {
            return Err(TooLong(self.backwards.len()));
        }
        Ok(self.backwards.iter().rev().flatten().copied().collect())
    }
}

/// A range that begins here; one that begins where the last did replaces it, one that says the same prolongs it.
fn begin<'a>(ranges: &mut Vec<Range<'a>>, first: u32, rules: &'a [Rule]) {
    if ranges.last().is_some_and(|last| last.first == first) {
        ranges.pop();
    }
    if ranges.last().is_none_or(|last| last.rules != rules) {
        ranges.push(Range { first, rules });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The kernel's interpreter, for the instructions that we use. Answers the action's value and the steps taken.
    pub fn run(filter: &[u8], architecture: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
        let instructions: Vec<(u16, usize, usize, u32)> = filter
            .chunks_exact(8)
            .map(|bytes| {
                let code = u16::from_ne_bytes([bytes[0], bytes[1]]);
                let k = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
                (code, bytes[2].into(), bytes[3].into(), k)
            })
            .collect();
        let load = |offset: u32| match offset {
            NUMBER => number,
            ARCHITECTURE => architecture,
            offset => {
                let argument = arguments[((offset - ARGUMENTS) / 8) as usize];
                if offset % 8 == 0 { argument as u32 } else { (argument >> 32) as u32 }
            }
        };
        let (mut at, mut accumulator, mut steps) = (0, 0, 0);
        loop {
            steps += 1;
            let (code, yes, no, k) = instructions[at];
            at += 1;
            let branch = |is: bool| if is { yes } else { no };
            match code {
                LOAD => accumulator = load(k),
                AND => accumulator &= k,
                JUMP => at += k as usize,
                IF_EQUAL => at += branch(accumulator == k),
                IF_GREATER => at += branch(accumulator > k),
                IF_NOT_LESS => at += branch(accumulator >= k),
                RETURN => return (k, steps),
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    /// What the rules mean, read plainly.
    fn meaning(tables: &[Table], foreign: Action, architecture: u32, number: u32, arguments: [u64; 6]) -> Action {
        let Some(table) = tables.iter().find(|table| table.architecture == architecture) else { return foreign };
        let holds = |condition: &Condition| {
            let argument = arguments[usize::from(condition.argument)];
            match condition.is {
                Is::Equal => argument == condition.value,
                Is::NotEqual => argument != condition.value,
                Is::Less => argument < condition.value,
                Is::NotGreater => argument <= condition.value,
                Is::Greater => argument > condition.value,
                Is::NotLess => argument >= condition.value,
                Is::EqualUnder(mask) => argument & mask == condition.value,
            }
        };
        if number > table.newest {
            return table.unknown;
        }
        let rules = table.calls.get(&number).map_or(&[][..], Vec::as_slice);
        let rule = rules.iter().find(|rule| rule.conditions.iter().all(holds));
        rule.map_or(table.otherwise, |rule| rule.action)
    }

    fn random_table(random: &mut fastrand::Rng, architecture: u32) -> Table {
        let actions = [Action::Allow, Action::Errno(1), Action::Errno(38), Action::Log, Action::KillProcess];
        let values = [0, 1, 2, 0x7e02_0000, 0xffff_ffff, 1 << 32, (1 << 32) + 1, u64::MAX];
        let count = random.usize(0..400);
        let newest = random.u32(400..500);
        let action = |random: &mut fastrand::Rng| *random.choice(&actions).expect("some");
        let calls = (0..count)
            .map(|_| {
                let rules = (0..random.usize(1..4)).map(|_| {
                    let conditions = (0..random.usize(0..3)).map(|_| {
                        let value = *random.choice(&values).expect("some");
                        let mask = *random.choice(&values).expect("some");
                        let all = [Is::Equal, Is::NotEqual, Is::Less, Is::NotGreater, Is::Greater, Is::NotLess];
                        let is = random.choice(all).unwrap_or(Is::EqualUnder(mask));
                        let is = if random.u8(0..7) == 0 { Is::EqualUnder(mask) } else { is };
                        Condition { argument: random.u8(0..6), is, value }
                    });
                    let conditions = conditions.collect();
                    Rule { conditions, action: actions[random.usize(0..actions.len())] }
                });
                let rules = rules.collect();
                (random.u32(0..=newest), rules)
            })
            .collect();
        Table { architecture, calls, otherwise: action(random), newest, unknown: Action::Errno(38) }
    }

    #[test]
    fn the_filter_means_what_the_rules_say() {
        let mut random = fastrand::Rng::with_seed(7);
        let values =
            [0, 1, 2, 3, 0x7e02_0000, 0x0100_0000, 0xffff_ffff, 1 << 32, (1 << 32) + 1, (1 << 32) + 2, u64::MAX];
        let mut compared = 0;
        for round in 0..40 {
            let tables = [random_table(&mut random, 1), random_table(&mut random, 2)];
            // Some do not fit, and then nothing may come of them.
            let Ok(filter) = compile(&tables, Action::KillProcess) else { continue };
            assert!(filter.len() <= MAX_INSTRUCTIONS * 8);
            for number in (0..520).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
                let architecture = random.u32(1..=3);
                let arguments = [0; 6].map(|_: u64| *random.choice(&values).expect("some"));
                let wanted = meaning(&tables, Action::KillProcess, architecture, number, arguments);
                let (given, _) = run(&filter, architecture, number, arguments);
                assert_eq!(given, wanted.value(), "round {round}: {architecture} {number} {arguments:x?}");
                compared += 1;
            }
        }
        assert!(compared > 10_000, "only {compared} calls were compared");
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let condition = |value| Condition { argument: 0, is: Is::Greater, value };
        let rule = |value| Rule { conditions: vec![condition(value)], action: Action::Errno(1) };
        let calls = (0..2).map(|number| (number, (0..1000).map(rule).collect())).collect();
        let table = Table { architecture: 1, calls, otherwise: Action::Allow, newest: 400, unknown: Action::Errno(38) };
        let error = compile(&[table], Action::KillProcess).expect_err("too long");
        assert!(error.0 > MAX_INSTRUCTIONS && error.to_string().contains("4096"));
    }
}
