package main

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// trees are volumes that are btrfs subvolumes: file trees that any number of nodes use at once, as a
// shared file system has them. Sizes are only noted.
type trees struct{ pool }

func (m *trees) volumePath(id string) string   { return filepath.Join(m.volumes(), id) }
func (m *trees) snapshotPath(id string) string { return filepath.Join(m.snapshots(), id) }

func (m *trees) usable(caps []*csi.VolumeCapability) (volumeKind, error) {
	kind := volumeKind{readOnly: true}
	err := accessModes(caps, func(c *csi.VolumeCapability, mode csi.VolumeCapability_AccessMode_Mode) error {
		if c.GetBlock() != nil {
			return invalid("a file tree is no block device")
		}
		kind.readOnly = kind.readOnly && (mode == csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY ||
			mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY)
		return nil
	})
	return kind, err
}

func (m *trees) smallest(volumeKind) (int64, error) { return 4096, nil }

// create: what is only read is a read-only snapshot of its source, there at once like one that can be written.
func (m *trees) create(v *volume, from string) error {
	if from == "" {
		return createSubvolume(m.volumePath(v.ID))
	}
	return snapshotSubvolume(from, m.volumePath(v.ID), v.ReadOnly)
}

func (m *trees) resize(*volume) error { return nil }

// user goes by what was published: nothing else holds a subvolume that is deleted.
func (m *trees) user(v *volume) (string, error) {
	for path := range v.Published {
		return path, nil
	}
	return "", nil
}

func (m *trees) destroy(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return destroySubvolume(path)
}

func (m *trees) cut(all []wanted, mode string) error {
	for _, w := range all {
		from, to := m.volumePath(w.volume), m.snapshotPath(w.id)
		var err error
		switch mode {
		case modeTorn:
			err = copyTree(from, to)
		case modeFrozen:
			err = invalid("a file tree cannot be frozen alone: mode %q", mode)
		default:
			err = snapshotSubvolume(from, to, true)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// copyTree is the negative control: file after file while they are written.
func copyTree(from, to string) error {
	if err := createSubvolume(to); err != nil {
		return err
	}
	if err := command("cp", "-a", "--reflink=never", from+"/.", to); err != nil {
		return errors.Join(err, destroySubvolume(to))
	}
	return nil
}

func (m *trees) source(v *volume, _ string, _ bool) (string, error) { return m.volumePath(v.ID), nil }
