package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// fsTypeOf gives "" for a device without a signature.
func fsTypeOf(dev string) (string, error) {
	out, err := exec.Command("blkid", "-p", "-s", "TYPE", "-o", "value", dev).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 2 { // nothing was found
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("blkid %s: %w", dev, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// smallest sizes that the mkfs programs accept, in bytes
var smallest = map[string]int64{"ext4": 16 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}

func makeFS(fsType, dev string) error {
	switch fsType {
	case "ext4":
		return command("mkfs.ext4", "-q", "-F", "-m0", dev)
	case "xfs", "btrfs":
		return command("mkfs."+fsType, "-q", "-f", dev)
	}
	return invalid("file system %q", fsType)
}

// mountDevice mounts and fits the file system to its device, which may have grown.
func mountDevice(fsType, dev, path string, flags []string) error {
	flags = slices.Clone(flags)
	if fsType == "xfs" {
		flags = append(flags, "nouuid") // a restored volume has the UUID of its source
	}
	if fsType == "ext4" {
		if err := growUnmountedExt4(dev); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(path, 0o750); err != nil {
		return err
	}
	args := []string{"-t", fsType, dev, path}
	if len(flags) > 0 {
		args = append([]string{"-o", strings.Join(flags, ",")}, args...)
	}
	if err := command("mount", args...); err != nil {
		return err
	}
	if fsType == "ext4" || slices.Contains(flags, "ro") {
		return nil
	}
	return growMounted(fsType, dev, path)
}

// growUnmountedExt4: ext4 grows while it is mounted only with CAP_SYS_RESOURCE, which a machine
// may lack. So it is grown before it is mounted, and only when it is smaller than its device.
func growUnmountedExt4(dev string) error {
	f, err := os.Open(dev)
	if err != nil {
		return err
	}
	super := make([]byte, 1024)
	_, err = f.ReadAt(super, 1024)
	size, errSeek := f.Seek(0, 2)
	if err := errors.Join(err, errSeek, f.Close()); err != nil {
		return fmt.Errorf("read the superblock of %s: %w", dev, err)
	}
	if has, block := ext4Size(super); has > size-block {
		return nil
	}
	var exit *exec.ExitError
	if err := command("e2fsck", "-f", "-p", dev); err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) { // 1: repaired
		return err
	}
	return command("resize2fs", dev)
}

// ext4Size reads s_blocks_count and s_log_block_size, both as bytes.
func ext4Size(super []byte) (size, block int64) {
	u32 := func(at int) int64 { return int64(binary.LittleEndian.Uint32(super[at:])) }
	block = 1024 << u32(0x18)
	return (u32(0x4) | u32(0x150)<<32) * block, block
}

func growMounted(fsType, dev, path string) error {
	switch fsType {
	case "ext4":
		return command("resize2fs", dev)
	case "xfs":
		return command("xfs_growfs", path)
	case "btrfs":
		return command("btrfs", "filesystem", "resize", "max", path)
	}
	return invalid("file system %q", fsType)
}

func isMounted(path string) (bool, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	return mountinfoHas(b, path), nil
}

func mountinfoHas(mountinfo []byte, path string) bool {
	path = strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(filepath.Clean(path))
	for line := range bytes.Lines(mountinfo) {
		if f := bytes.Fields(line); len(f) > 4 && string(f[4]) == path {
			return true
		}
	}
	return false
}

// unmount is content when nothing is mounted.
func unmount(path string) error {
	if mounted, err := isMounted(path); err != nil || !mounted {
		return err
	}
	if err := unix.Unmount(path, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}
