//! The bpf(2) calls that the device cgroup gate needs, as safe functions. The only place here
//! with unsafe code; no decisions.
//!
//! Layouts are the prefixes of `union bpf_attr` and `struct bpf_prog_info` in uapi linux/bpf.h,
//! which the kernel keeps stable; fields beyond a prefix count as zero.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::filter::Instruction;

const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const PROG_ATTACH: libc::c_int = 8;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;

/// BPF_PROG_TYPE_CGROUP_DEVICE.
pub const TYPE_CGROUP_DEVICE: u32 = 15;
/// BPF_CGROUP_DEVICE, the attach type.
const CGROUP_DEVICE: u32 = 6;
/// The attachment allows more programs beside it.
pub const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;
const QUERY_EFFECTIVE: u32 = 1;

/// Programs of a cgroup, in the kernel's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// How they were attached; meaningless for effective ones.
    pub flags: u32,
    pub ids: Vec<u32>,
}

/// What the kernel tells about a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    pub id: u32,
    pub type_: u32,
    /// Hexadecimal hash of its instructions.
    pub tag: String,
    pub maps: u32,
    /// Empty when the kernel does not show them.
    pub instructions: Vec<Instruction>,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgInfo {
    type_: u32,
    id: u32,
    tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; 16],
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
    relative: u32,
    expected_revision: u64,
}

#[repr(C)]
#[derive(Default)]
struct PathAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// One bpf(2) call.
fn call<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    let size = size_of::<T>();
    // SAFETY: `attr` is a live, exclusively borrowed repr(C) value of `size` bytes whose layout is
    // the kernel's for `command`; every pointer in it was taken by the callers below from buffers
    // that outlive the call, with their true lengths. The kernel writes inside those only.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn new_fd(result: io::Result<i32>) -> io::Result<OwnedFd> {
    // SAFETY: the call succeeded, and the commands this is used for return a new descriptor that
    // nobody else owns.
    result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(start: *const T) -> u64 {
    start.addr() as u64
}

fn query(cgroup: BorrowedFd<'_>, query_flags: u32) -> io::Result<Attached> {
    let mut room = 64usize;
    loop {
        let mut ids = vec![0u32; room];
        let mut attr = QueryAttr {
            target_fd: number(cgroup),
            attach_type: CGROUP_DEVICE,
            query_flags,
            prog_ids: address(ids.as_mut_ptr()),
            prog_cnt: u32::try_from(room).map_err(io::Error::other)?,
            ..QueryAttr::default()
        };
        match call(PROG_QUERY, &mut attr) {
            // There were more than fit.
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 65_536 => room *= 2,
            Err(e) => return Err(e),
            Ok(_) => {
                ids.truncate(usize::try_from(attr.prog_cnt).map_err(io::Error::other)?);
                return Ok(Attached {
                    flags: attr.attach_flags,
                    ids,
                });
            }
        }
    }
}

/// The device programs attached to this very cgroup.
pub fn attached(cgroup: BorrowedFd<'_>) -> io::Result<Attached> {
    query(cgroup, 0)
}

/// Ids of all device programs that a process in this cgroup must pass, its ancestors' included.
pub fn effective(cgroup: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    query(cgroup, QUERY_EFFECTIVE).map(|a| a.ids)
}

/// The program with this id; ENOENT when it is gone.
pub fn by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = IdAttr {
        id,
        ..IdAttr::default()
    };
    new_fd(call(PROG_GET_FD_BY_ID, &mut attr))
}

fn read_info(program: BorrowedFd<'_>, info: &mut ProgInfo) -> io::Result<()> {
    let mut attr = InfoAttr {
        bpf_fd: number(program),
        info_len: u32::try_from(size_of::<ProgInfo>()).map_err(io::Error::other)?,
        info: address(std::ptr::from_mut(info)),
    };
    call(OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// What a program is, with its instructions.
pub fn info(program: BorrowedFd<'_>) -> io::Result<Info> {
    let mut sizes = ProgInfo::default();
    read_info(program, &mut sizes)?;
    let length = usize::try_from(sizes.xlated_prog_len).map_err(io::Error::other)?;
    let mut bytes = vec![0u8; length];
    let mut full = ProgInfo {
        xlated_prog_len: sizes.xlated_prog_len,
        xlated_prog_insns: address(bytes.as_mut_ptr()),
        ..ProgInfo::default()
    };
    read_info(program, &mut full)?;
    // The kernel clears the pointer when it may not show them (kernel/bpf/syscall.c).
    if full.xlated_prog_insns == 0 {
        bytes.clear();
    }
    Ok(Info {
        id: full.id,
        type_: full.type_,
        tag: full.tag.iter().map(|b| format!("{b:02x}")).collect(),
        maps: full.nr_map_ids,
        instructions: bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|chunk| Instruction::from_bytes(*chunk))
            .collect(),
    })
}

/// Loads a device program; the verifier's words are in the error.
pub fn load(instructions: &[Instruction]) -> io::Result<OwnedFd> {
    let bytes: Vec<u8> = instructions.iter().flat_map(|i| i.to_bytes()).collect();
    let mut log = vec![0u8; 64 << 10];
    let license = c"Apache-2.0";
    let mut name = [0u8; 16];
    for (to, from) in name.iter_mut().zip(b"vfprov_dev") {
        *to = *from;
    }
    let mut attr = LoadAttr {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: address(bytes.as_ptr()),
        license: address(license.as_ptr()),
        prog_name: name,
        expected_attach_type: CGROUP_DEVICE,
        ..LoadAttr::default()
    };
    new_fd(call(PROG_LOAD, &mut attr)).or_else(|_| {
        attr.log_level = 1;
        attr.log_size = u32::try_from(log.len()).map_err(io::Error::other)?;
        attr.log_buf = address(log.as_mut_ptr());
        new_fd(call(PROG_LOAD, &mut attr)).map_err(|e| {
            let said = String::from_utf8_lossy(&log);
            let said = said.trim_end_matches('\0').trim();
            io::Error::new(e.kind(), format!("{e}; the verifier says: {said}"))
        })
    })
}

/// Puts `new` in the place of `old` on this cgroup, in one step; ENOENT when `old` is not
/// attached there (any more).
pub fn replace(cgroup: BorrowedFd<'_>, new: BorrowedFd<'_>, old: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: number(cgroup),
        attach_bpf_fd: number(new),
        attach_type: CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI | REPLACE,
        replace_bpf_fd: number(old),
        ..AttachAttr::default()
    };
    call(PROG_ATTACH, &mut attr).map(drop)
}

/// Attaches one more program, as runc and systemd do.
pub fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = AttachAttr {
        target_fd: number(cgroup),
        attach_bpf_fd: number(program),
        attach_type: CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI,
        ..AttachAttr::default()
    };
    call(PROG_ATTACH, &mut attr).map(drop)
}

fn path_call(command: libc::c_int, path: &Path, bpf_fd: u32) -> io::Result<i32> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let mut attr = PathAttr {
        pathname: address(path.as_ptr()),
        bpf_fd,
        file_flags: 0,
    };
    call(command, &mut attr)
}

/// Keeps a program alive under a name in a bpffs.
pub fn pin(program: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    path_call(OBJ_PIN, path, number(program)).map(drop)
}

/// The program that is pinned under a name.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    new_fd(path_call(OBJ_GET, path, 0))
}
