//! Device filter programs as plain values: what they say about a device, and the same program
//! with one more rule in front. No I/O, no kernel.
//!
//! runc, systemd and crun write a device filter as one straight line of comparisons over the
//! twelve bytes of `struct bpf_cgroup_dev_ctx` {access_type, major, minor}, without maps or
//! helpers. The kernel gives it back as translated instructions, which for this program type are
//! the loaded ones (cgroup device programs have no context rewriting, kernel/bpf/cgroup.c), less
//! dead code. What is not of that form is refused, never guessed at.

use std::fmt;

use thiserror::Error;

use super::journal::Device;

/// Longest program looked at; the longest seen is under 300 instructions.
const LONGEST: usize = 65_536;

/// BPF_DEVCG_DEV_CHAR and the accesses in the upper half of `access_type`.
const KIND_CHAR: u32 = 2;
const ACCESS_READ: u32 = 2;
const ACCESS_WRITE: u32 = 4;

/// One instruction, as in `struct bpf_insn`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    pub destination: u8,
    pub source: u8,
    pub offset: i16,
    pub immediate: i32,
}

impl fmt::Debug for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x} r{} r{} {:+} {}",
            self.code, self.destination, self.source, self.offset, self.immediate
        )
    }
}

impl Instruction {
    #[must_use]
    pub const fn new(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Self {
        Self {
            code,
            destination,
            source,
            offset,
            immediate,
        }
    }

    #[must_use]
    pub const fn from_bytes(b: [u8; 8]) -> Self {
        Self {
            code: b[0],
            destination: b[1] & 0x0f,
            source: b[1] >> 4,
            offset: i16::from_le_bytes([b[2], b[3]]),
            immediate: i32::from_le_bytes([b[4], b[5], b[6], b[7]]),
        }
    }

    #[must_use]
    pub const fn to_bytes(self) -> [u8; 8] {
        let o = self.offset.to_le_bytes();
        let i = self.immediate.to_le_bytes();
        let registers = (self.destination & 0x0f) | (self.source << 4);
        [self.code, registers, o[0], o[1], i[0], i[1], i[2], i[3]]
    }
}

/// Why a program's meaning is not known.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FilterError {
    #[error(
        "its instructions cannot be read; the kernel hides them when net.core.bpf_jit_harden is set"
    )]
    Empty,
    #[error("it has {0} instructions, more than any device filter")]
    TooLong(usize),
    #[error("instruction {at} ({text}) is not one that a device filter has")]
    Unknown { at: usize, text: String },
    #[error("instruction {at} leads outside the program or backwards")]
    Jump { at: usize },
    #[error("instruction {at} uses a register that has no value")]
    Unset { at: usize },
    #[error("it does not end")]
    NoEnd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Value {
    Unset,
    /// The context's address.
    Context,
    Number(u64),
}

// Instruction classes and fields (uapi linux/bpf_common.h, bpf.h).
const CLASS: u8 = 0x07;
const LD: u8 = 0x00;
const LDX: u8 = 0x01;
const ALU32: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
const FROM_REGISTER: u8 = 0x08;
const LD_IMM64: u8 = 0x18;
const EXIT: u8 = 0x95;
const JA: u8 = 0x05;

/// What a program says about opening a character device for reading and writing.
pub fn allows(program: &[Instruction], device: Device) -> Result<bool, FilterError> {
    run(
        program,
        [
            KIND_CHAR | ((ACCESS_READ | ACCESS_WRITE) << 16),
            device.major,
            device.minor,
        ],
    )
}

/// Runs a program over a context of {access_type, major, minor}; true when it allows.
///
/// Jumps lead forward only, so it ends after at most as many steps as there are instructions.
pub fn run(program: &[Instruction], context: [u32; 3]) -> Result<bool, FilterError> {
    if program.is_empty() {
        return Err(FilterError::Empty);
    }
    if program.len() > LONGEST {
        return Err(FilterError::TooLong(program.len()));
    }
    let mut machine = Machine {
        registers: [Value::Unset; 11],
        context,
    };
    machine.set(0, 1, Value::Context)?;
    let mut at = 0;
    while let Some(instruction) = program.get(at) {
        if instruction.code == EXIT {
            // The kernel reads 32 bits; anything but 0 allows.
            let result = machine.number(at, 0)?;
            return Ok(result & 0xffff_ffff != 0);
        }
        at = machine.step(program, at, *instruction)?;
    }
    Err(FilterError::NoEnd)
}

struct Machine {
    registers: [Value; 11],
    context: [u32; 3],
}

impl Machine {
    fn get(&self, at: usize, register: u8) -> Result<Value, FilterError> {
        match self.registers.get(usize::from(register)) {
            Some(Value::Unset) | None => Err(FilterError::Unset { at }),
            Some(value) => Ok(*value),
        }
    }

    fn number(&self, at: usize, register: u8) -> Result<u64, FilterError> {
        match self.get(at, register)? {
            Value::Number(n) => Ok(n),
            // Comparing or computing with the context's address has no place in a filter.
            _ => Err(FilterError::Unset { at }),
        }
    }

    fn set(&mut self, at: usize, register: u8, value: Value) -> Result<(), FilterError> {
        match self.registers.get_mut(usize::from(register)) {
            Some(slot) => {
                *slot = value;
                Ok(())
            }
            None => Err(FilterError::Unset { at }),
        }
    }

    /// Carries out one instruction and says which is next.
    fn step(
        &mut self,
        program: &[Instruction],
        at: usize,
        i: Instruction,
    ) -> Result<usize, FilterError> {
        match i.code & CLASS {
            ALU32 | ALU64 => self.arithmetic(at, i)?,
            LDX => self.load(at, i)?,
            LD if i.code == LD_IMM64 && i.source == 0 => {
                let high = program.get(at + 1).ok_or(FilterError::NoEnd)?;
                let low = u64::from(i.immediate.cast_unsigned());
                let value = low | (u64::from(high.immediate.cast_unsigned()) << 32);
                self.set(at, i.destination, Value::Number(value))?;
                return Ok(at + 2);
            }
            JMP | JMP32 => {
                if self.jumps(at, i)? {
                    let skip = usize::try_from(i.offset).map_err(|_| FilterError::Jump { at })?;
                    let target = at + 1 + skip;
                    return (target < program.len())
                        .then_some(target)
                        .ok_or(FilterError::Jump { at });
                }
            }
            _ => return Err(unknown(at, i)),
        }
        Ok(at + 1)
    }

    fn load(&mut self, at: usize, i: Instruction) -> Result<(), FilterError> {
        let size = match i.code {
            0x61 => 4,
            0x69 => 2,
            0x71 => 1,
            _ => return Err(unknown(at, i)),
        };
        if self.get(at, i.source)? != Value::Context {
            return Err(unknown(at, i));
        }
        let bytes: Vec<u8> = self.context.iter().flat_map(|w| w.to_le_bytes()).collect();
        let read = usize::try_from(i.offset)
            .ok()
            .and_then(|from| bytes.get(from..from.checked_add(size)?))
            .ok_or_else(|| unknown(at, i))?;
        let value = read
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte));
        self.set(at, i.destination, Value::Number(value))
    }

    fn operand(&self, at: usize, i: Instruction) -> Result<u64, FilterError> {
        if i.code & FROM_REGISTER == 0 {
            Ok(i64::from(i.immediate).cast_unsigned())
        } else {
            self.number(at, i.source)
        }
    }

    fn arithmetic(&mut self, at: usize, i: Instruction) -> Result<(), FilterError> {
        const MOV: u8 = 0xb;
        let wide = i.code & CLASS == ALU64;
        let operation = i.code >> 4;
        // An offset selects signed variants that no filter has.
        if i.offset != 0 {
            return Err(unknown(at, i));
        }
        if operation == MOV && wide && i.code & FROM_REGISTER != 0 {
            let value = self.get(at, i.source)?;
            return self.set(at, i.destination, value);
        }
        let b = self.operand(at, i)?;
        let a = if operation == MOV {
            0
        } else {
            self.number(at, i.destination)?
        };
        let result = if wide {
            alu64(operation, a, b)
        } else {
            alu32(operation, low(a), low(b)).map(u64::from)
        };
        let value = result.ok_or_else(|| unknown(at, i))?;
        self.set(at, i.destination, Value::Number(value))
    }

    fn jumps(&self, at: usize, i: Instruction) -> Result<bool, FilterError> {
        if i.code == JA {
            return Ok(true);
        }
        // Calls and returns share the class: said as what they are, whatever r0 holds.
        if compare(i.code >> 4, 0, 0, 0, 0).is_none() {
            return Err(unknown(at, i));
        }
        let a = self.number(at, i.destination)?;
        let b = self.operand(at, i)?;
        let taken = if i.code & CLASS == JMP {
            compare(i.code >> 4, a, b, a.cast_signed(), b.cast_signed())
        } else {
            let (a, b) = (low(a), low(b));
            compare(
                i.code >> 4,
                a.into(),
                b.into(),
                a.cast_signed().into(),
                b.cast_signed().into(),
            )
        };
        taken.ok_or_else(|| unknown(at, i))
    }
}

fn unknown(at: usize, i: Instruction) -> FilterError {
    FilterError::Unknown {
        at,
        text: format!("{i:?}"),
    }
}

/// The lower half of a register, which 32-bit instructions work on.
#[allow(clippy::cast_possible_truncation)]
const fn low(value: u64) -> u32 {
    value as u32
}

/// The arithmetic of both widths: the operations are the same, the shift's mask is not.
/// What BPF defines for a zero divisor: 0, and the dividend as the remainder.
macro_rules! alu {
    ($name:ident, $word:ty, $mask:literal) => {
        fn $name(operation: u8, a: $word, b: $word) -> Option<$word> {
            let shift = b & $mask;
            Some(match operation {
                0x0 => a.wrapping_add(b),
                0x1 => a.wrapping_sub(b),
                0x2 => a.wrapping_mul(b),
                0x3 => a.checked_div(b).unwrap_or(0),
                0x4 => a | b,
                0x5 => a & b,
                0x6 => a << shift,
                0x7 => a >> shift,
                0x8 => a.wrapping_neg(),
                0x9 => a.checked_rem(b).unwrap_or(a),
                0xa => a ^ b,
                0xb => b,
                0xc => (a.cast_signed() >> shift).cast_unsigned(),
                _ => return None,
            })
        }
    };
}

alu!(alu64, u64, 63);
alu!(alu32, u32, 31);

fn compare(operation: u8, a: u64, b: u64, sa: i64, sb: i64) -> Option<bool> {
    Some(match operation {
        0x1 => a == b,
        0x2 => a > b,
        0x3 => a >= b,
        0x4 => a & b != 0,
        0x5 => a != b,
        0x6 => sa > sb,
        0x7 => sa >= sb,
        0xa => a < b,
        0xb => a <= b,
        0xc => sa < sb,
        0xd => sa <= sb,
        _ => return None,
    })
}

/// The same program with a rule in front that lets these character devices be opened for
/// reading and writing. What the program itself said is still asked for everything else.
///
/// The rule leaves r1, the context, alone; r2 to r5 and r0 have no value at the start of any
/// program, so nothing in it can depend on them. Jumps are relative and need no change.
#[must_use]
pub fn widen(program: &[Instruction], devices: &[Device]) -> Vec<Instruction> {
    let word = |register, offset| Instruction::new(0x61, register, 1, offset, 0);
    let mut out = Vec::with_capacity(program.len() + devices.len() * 13);
    for device in devices {
        let rule = [
            word(2, 0),                         // r2 = access_type
            Instruction::new(0xbc, 3, 2, 0, 0), // w3 = w2
            Instruction::new(0x54, 2, 0, 0, 0xffff),
            Instruction::new(0x55, 2, 0, 9, KIND_CHAR.cast_signed()), // not a char device
            Instruction::new(0x74, 3, 0, 0, 16),                      // w3 >>= 16: the accesses
            // Anything but reading and writing (mknod) is not ours to allow.
            Instruction::new(0x54, 3, 0, 0, !(ACCESS_READ | ACCESS_WRITE).cast_signed()),
            Instruction::new(0x55, 3, 0, 6, 0),
            word(4, 4),
            Instruction::new(0x56, 4, 0, 4, device.major.cast_signed()),
            word(5, 8),
            Instruction::new(0x56, 5, 0, 2, device.minor.cast_signed()),
            Instruction::new(0xb7, 0, 0, 0, 1),
            Instruction::new(EXIT, 0, 0, 0, 0),
        ];
        out.extend(rule);
    }
    out.extend_from_slice(program);
    out
}

#[cfg(test)]
mod tests;
