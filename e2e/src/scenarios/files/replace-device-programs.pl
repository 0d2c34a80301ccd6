# perl - CGROUP [MAJOR:MINOR|MAJOR:*]...
#
# Plays somebody who manages a launcher's devices himself, as KubeVirt does at its own hotplugs:
# puts a device program of its own in the place of each that is attached to the cgroup, without
# asking what that let through. The new one lets everything through but the devices named.
# Prints the ids of the programs that are attached then; without devices it changes nothing.
#
# Numbers and layouts are those of union bpf_attr in uapi linux/bpf.h.
use strict;
use warnings;
use Fcntl qw(O_RDONLY O_DIRECTORY);

my ($cgroup, @denied) = @ARGV;
my $device = 6;    # BPF_CGROUP_DEVICE

sub bpf {
    my ($command, $attr) = @_;
    my $result = syscall 321, $command, $attr, length $attr;
    die "bpf command $command: $!\n" if $result < 0;
    return ($result, $attr);
}

sub pointer { return unpack 'Q', pack 'P', $_[0] }

sub instruction {
    my ($code, $to, $from, $offset, $value) = @_;
    return pack 'CCsl', $code, $to | $from << 4, $offset, $value;
}

sub attached {
    my ($on) = @_;
    my $ids = "\0" x 256;
    my (undef, $said) = bpf(16, pack 'LLLLQLL', $on, $device, 0, 0, pointer($ids), 64, 0);
    return unpack 'L' . unpack('x24 L', $said), $ids;
}

sub program {
    my $code = instruction(0x61, 2, 1, 0, 0) . instruction(0x54, 2, 0, 0, 0xffff);
    my $tests = '';
    for (reverse @denied) {
        my ($major, $minor) = /^(\d+):(\d+|\*)$/ or die "not a device: $_\n";
        my $far = length($tests) / 8 + 2;    # over what follows and the two that let through
        my $deny = instruction(0x05, 0, 0, $far, 0);
        $deny = instruction(0x55, 5, 0, 1, $minor) . $deny if $minor ne '*';
        $tests = instruction(0x55, 4, 0, length($deny) / 8, $major) . $deny . $tests;
    }
    # Only character devices (2) are looked at.
    $code .= instruction(0x55, 2, 0, length($tests) / 8 + 2, 2);
    $code .= instruction(0x61, 4, 1, 4, 0) . instruction(0x61, 5, 1, 8, 0) . $tests;
    $code .= instruction(0xb4, 0, 0, 0, 1) . instruction(0x95, 0, 0, 0, 0);
    $code .= instruction(0xb4, 0, 0, 0, 0) . instruction(0x95, 0, 0, 0, 0);
    my ($license, $name) = ("GPL\0", 'e2e_standin');
    my ($fd) = bpf(5, pack 'LLQQLLQLLa16LL', 15, length($code) / 8, pointer($code),
        pointer($license), 0, 0, 0, 0, 0, $name, 0, $device);
    return $fd;
}

sysopen my $folder, $cgroup, O_RDONLY | O_DIRECTORY or die "$cgroup: $!\n";
my $on = fileno $folder;
if (@denied) {
    for my $id (attached($on)) {
        my ($old) = bpf(13, pack 'LLL', $id, 0, 0);
        # BPF_F_ALLOW_MULTI | BPF_F_REPLACE
        bpf(8, pack 'LLLLLLQ', $on, program(), $device, 2 | 4, $old, 0, 0);
    }
}
print join(' ', attached($on)), "\n";
