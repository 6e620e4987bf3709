package main

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pool is the btrfs directory with everything in it:
//
//	volumes/    one subvolume with the image of each volume, or a subvolume each
//	snapshots/  one image or read-only subvolume per snapshot (shares its data with the volume)
//	records/    what the driver knows of them
//	faults      what goes wrong on purpose
//	cut-*       read-only snapshot of volumes/, only while a group snapshot is taken
//	freeze-*    mount points, only while a file system is frozen
type pool struct{ dir string }

func (p pool) volumes() string   { return filepath.Join(p.dir, "volumes") }
func (p pool) snapshots() string { return filepath.Join(p.dir, "snapshots") }

// prepare makes the subvolume and removes what an instance that died amid a cut left.
// The caller holds the pool's lock, so no cut is under way.
func (p pool) prepare() error {
	if _, err := os.Stat(p.volumes()); errors.Is(err, os.ErrNotExist) {
		if err := createSubvolume(p.volumes()); err != nil {
			return fmt.Errorf("make the volumes' subvolume (is the pool btrfs?): %w", err)
		}
	} else if err != nil {
		return err
	}
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(p.dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "cut-"):
			err = destroySubvolume(path)
		case strings.HasPrefix(e.Name(), "freeze-"):
			err = os.Remove(path)
		default:
			continue
		}
		if err != nil { // a mount point of another node's namespace stays busy: harmless
			log.Printf("left in place: %s: %v", path, err)
		}
	}
	return nil
}

// struct btrfs_ioctl_vol_args and btrfs_ioctl_vol_args_v2 of linux/btrfs.h
type subvolumeArgs struct {
	_    int64
	name [4088]byte
}

type snapshotArgs struct {
	source, _, flags uint64
	_                [4]uint64
	name             [4040]byte
}

const (
	btrfsSubvolumeCreate = 0x5000940e
	btrfsSnapshotDestroy = 0x5000940f
	btrfsSnapshotCreate2 = 0x50009417
	btrfsReadOnly        = 1 << 1
)

func ioctl(f *os.File, request uintptr, arg unsafe.Pointer) error {
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

func inParent(path string, request uintptr, arg unsafe.Pointer) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	if err := ioctl(d, request, arg); err != nil {
		return fmt.Errorf("btrfs %s: %w", path, err)
	}
	return nil
}

func createSubvolume(path string) error {
	var a subvolumeArgs
	copy(a.name[:], filepath.Base(path))
	return inParent(path, btrfsSubvolumeCreate, unsafe.Pointer(&a))
}

func destroySubvolume(path string) error {
	var a subvolumeArgs
	copy(a.name[:], filepath.Base(path))
	return inParent(path, btrfsSnapshotDestroy, unsafe.Pointer(&a))
}

// snapshotSubvolume is one transaction of the pool's file system: atomic over all files in it.
func snapshotSubvolume(src, dst string, readOnly bool) error {
	s, err := os.Open(src)
	if err != nil {
		return err
	}
	defer s.Close()
	a := snapshotArgs{source: uint64(s.Fd())}
	if readOnly {
		a.flags = btrfsReadOnly
	}
	copy(a.name[:], filepath.Base(dst))
	return inParent(dst, btrfsSnapshotCreate2, unsafe.Pointer(&a))
}
