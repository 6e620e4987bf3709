package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// images are volumes in sparse files, used as loop devices: one node at a time, raw or with a file system.
type images struct {
	pool
	loops loopDevices
}

func (m *images) volumePath(id string) string   { return filepath.Join(m.volumes(), id+".img") }
func (m *images) snapshotPath(id string) string { return filepath.Join(m.snapshots(), id+".img") }

// usable: an image on one node cannot be shared, so every mode that needs more than one is refused.
func (m *images) usable(caps []*csi.VolumeCapability) (volumeKind, error) {
	kind := volumeKind{fsType: "ext4"}
	err := accessModes(caps, func(c *csi.VolumeCapability, mode csi.VolumeCapability_AccessMode_Mode) error {
		switch mode {
		case csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY,
			csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER,
			csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
			return invalid("access mode %v: a volume is usable on one node only", mode)
		}
		kind.block = kind.block || c.GetBlock() != nil
		if t := c.GetMount().GetFsType(); t != "" {
			kind.fsType = t
		}
		return nil
	})
	return kind, err
}

func (m *images) smallest(kind volumeKind) (int64, error) {
	if kind.block {
		return 1 << 20, nil
	}
	least, known := smallest[kind.fsType]
	if !known {
		return 0, invalid("file system %q", kind.fsType)
	}
	return least, nil
}

// create gives a sparse image.
func (m *images) create(v *volume, from string) error {
	path := m.volumePath(v.ID)
	if from != "" {
		if err := reflink(from, path); err != nil {
			return err
		}
	} else if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return m.resize(v)
}

func (m *images) resize(v *volume) error { return os.Truncate(m.volumePath(v.ID), v.Size) }

func (m *images) user(v *volume) (string, error) {
	dev, err := loopOf(m.volumePath(v.ID))
	if errors.Is(err, os.ErrNotExist) { // an earlier deletion got so far
		return "", nil
	}
	return dev, err
}

func (m *images) destroy(path string) error { return removeFile(path) }

func (m *images) stage(v *volume, c *csi.VolumeCapability, path string) error {
	image := m.volumePath(v.ID)
	dev, err := m.loops.attach(image)
	if err != nil || c.GetBlock() != nil {
		return err
	}
	if err := stageFS(v, dev, path, c.GetMount()); err != nil {
		// nothing will unstage what was never staged
		return errors.Join(err, m.loops.detach(image))
	}
	return nil
}

func stageFS(v *volume, dev, path string, m *csi.VolumeCapability_MountVolume) error {
	if mounted, err := isMounted(path); err != nil || mounted {
		return err
	}
	fsType, err := fsTypeOf(dev)
	if err != nil {
		return err
	}
	if fsType == "" {
		if fsType = m.GetFsType(); fsType == "" {
			fsType = v.FsType
		}
		if err := makeFS(fsType, dev); err != nil {
			return err
		}
	}
	return mountDevice(fsType, dev, path, m.GetMountFlags())
}

func (m *images) unstage(id, path string) error {
	if err := unmount(path); err != nil {
		return err
	}
	return m.loops.detach(m.volumePath(id))
}

func (m *images) source(v *volume, staging string, block bool) (string, error) {
	if !block {
		return staging, nil
	}
	return m.loops.attach(m.volumePath(v.ID))
}

func (m *images) grow(v *volume, path string) error {
	dev, err := m.loops.attach(m.volumePath(v.ID)) // also makes the device as large as the image
	if err != nil || v.Block {
		return err
	}
	fsType, err := fsTypeOf(dev)
	if err != nil {
		return err
	}
	if err := growMounted(fsType, dev, path); err != nil {
		return status.Errorf(codes.FailedPrecondition, "%v (ext4 grows at its next staging)", err)
	}
	return nil
}

func (m *images) cut(all []wanted, mode string) error {
	switch mode {
	case modeTorn:
		return m.copyImages(all)
	case modeFrozen:
		return m.withFrozen(all, func() error { return m.cutImages(all) })
	}
	return m.cutImages(all)
}

func (m *images) cutImages(all []wanted) (err error) {
	if len(all) == 1 {
		return reflink(m.volumePath(all[0].volume), m.snapshotPath(all[0].id))
	}
	frame := filepath.Join(m.dir, "cut-"+all[0].id)
	if err := snapshotSubvolume(m.volumes(), frame, true); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, destroySubvolume(frame)) }()
	for _, w := range all {
		if err := reflink(filepath.Join(frame, w.volume+".img"), m.snapshotPath(w.id)); err != nil {
			return err
		}
	}
	return nil
}

// copyImages is the negative control: it copies as a driver does that has no snapshots.
func (m *images) copyImages(all []wanted) error {
	for _, w := range all {
		if err := command("cp", "--reflink=never", "--sparse=always", m.volumePath(w.volume), m.snapshotPath(w.id)); err != nil {
			return err
		}
	}
	return nil
}

func (m *images) withFrozen(all []wanted, do func() error) (err error) {
	for _, w := range all {
		thaw, e := m.freeze(m.volumePath(w.volume))
		if e != nil {
			return e
		}
		defer func() { err = errors.Join(err, thaw()) }()
	}
	return do()
}

// reflink is atomic for one file: the kernel holds the source's inode for the whole range.
func reflink(src, dst string) (err error) {
	s, err := os.Open(src)
	if err != nil {
		return err
	}
	defer s.Close()
	tmp := dst + ".tmp"
	d, err := os.OpenFile(tmp, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = unix.IoctlFileClone(int(d.Fd()), int(s.Fd()))
	if err = errors.Join(err, d.Close()); err != nil {
		return errors.Join(fmt.Errorf("clone %s: %w", src, err), os.Remove(tmp))
	}
	return os.Rename(tmp, dst)
}

// freeze stops the writers of the image's file system, in whatever mount namespace it is mounted:
// a second mount of the same device is the same superblock. An image that no node has attached,
// or that has no file system, needs no freezing.
func (p pool) freeze(image string) (thaw func() error, err error) {
	nothing := func() error { return nil }
	dev, err := loopOf(image)
	if err != nil || dev == "" {
		return nothing, err
	}
	fsType, err := fsTypeOf(dev)
	if err != nil || fsType == "" {
		return nothing, err
	}
	dir, err := os.MkdirTemp(p.dir, "freeze-")
	if err != nil {
		return nil, err
	}
	if err := command("mount", "-t", fsType, dev, dir); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, errors.Join(err, unmount(dir), os.Remove(dir))
	}
	const fiFreeze, fiThaw = 0xc0045877, 0xc0045878
	leave := func() error { return errors.Join(f.Close(), unmount(dir), os.Remove(dir)) }
	if err := ioctl(f, fiFreeze, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("freeze %s: %w", dev, err), leave())
	}
	return func() error {
		err := ioctl(f, fiThaw, nil)
		return errors.Join(err, leave())
	}, nil
}
