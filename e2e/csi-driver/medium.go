package main

import (
	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// medium is what volumes and snapshots are made of. Callers hold the driver's lock.
type medium interface {
	// usable reads what kind of volume is asked for, or refuses it.
	usable(caps []*csi.VolumeCapability) (kind volumeKind, err error)
	// smallest is the least size in bytes of a volume.
	smallest(kind volumeKind) (int64, error)
	volumePath(id string) string
	snapshotPath(id string) string
	// create makes a volume, with the content of the snapshot or volume at from when it is not empty.
	create(v *volume, from string) error
	resize(v *volume) error
	// user names what has the volume in use; empty: nothing.
	user(v *volume) (string, error)
	// destroy removes what lies at a path of a volume or snapshot; it is content when nothing does.
	destroy(path string) error
	// cut takes all snapshots at one point in time, unless the mode is torn.
	cut(all []wanted, mode string) error
	// source is what a pod's path shows of a volume that is staged at a path, if it was staged.
	source(v *volume, staging string, block bool) (string, error)
}

// devices is a medium of block devices. Only these are attached and staged, have changed blocks, and
// are cut together in groups; each method is one of the node that uses the volume.
type devices interface {
	medium
	stage(v *volume, c *csi.VolumeCapability, path string) error
	unstage(id, path string) error
	// grow makes a mounted file system, or the device, as large as the volume.
	grow(v *volume, path string) error
}

// volumeKind is what the capabilities of a volume come to.
type volumeKind struct {
	block    bool
	fsType   string
	readOnly bool // all who use it only read
}

func (d *driver) hasDevices() bool {
	_, has := d.medium.(devices)
	return has
}

// onlyForDevices answers calls that make sense only for block devices, as a driver does that lacks them.
func (d *driver) onlyForDevices() (devices, error) {
	if m, has := d.medium.(devices); has {
		return m, nil
	}
	return nil, status.Error(codes.Unimplemented, "volumes that are file trees have no such call")
}

// accessModes calls each for every capability and refuses what is neither a file system nor a block device.
func accessModes(caps []*csi.VolumeCapability, each func(*csi.VolumeCapability, csi.VolumeCapability_AccessMode_Mode) error) error {
	if len(caps) == 0 {
		return invalid("volume capabilities are missing")
	}
	for _, c := range caps {
		if c.GetBlock() == nil && c.GetMount() == nil {
			return invalid("access type is missing")
		}
		if err := each(c, c.GetAccessMode().GetMode()); err != nil {
			return err
		}
	}
	return nil
}

// locked runs a node's part of a call for devices with the volume's record, under the driver's lock.
func (d *driver) locked(id string, do func(devices, *volume) error) error {
	m, err := d.onlyForDevices()
	if err != nil {
		return err
	}
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	v, err := load[volume](d.records, id)
	if err != nil {
		return missing(err, "volume", id)
	}
	return do(m, v)
}
