package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (d *driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	r := &csi.NodeGetInfoResponse{NodeId: d.nodeID}
	if d.topology {
		r.AccessibleTopology = d.topologyOf(d.nodeID)
	}
	return r, nil
}

func (d *driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	all := []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	}
	if d.hasDevices() {
		all = append(all, csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME, csi.NodeServiceCapability_RPC_EXPAND_VOLUME)
	}
	for _, t := range all {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{Type: &csi.NodeServiceCapability_Rpc{
			Rpc: &csi.NodeServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

func (d *driver) NodeStageVolume(_ context.Context, q *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if q.VolumeId == "" || q.StagingTargetPath == "" || q.VolumeCapability == nil {
		return nil, invalid("volume id, staging path or capability is missing")
	}
	err := d.locked(q.VolumeId, func(m devices, v *volume) error {
		return m.stage(v, q.VolumeCapability, q.StagingTargetPath)
	})
	if err != nil {
		return nil, internal(err)
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

func (d *driver) NodeUnstageVolume(_ context.Context, q *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if q.VolumeId == "" || q.StagingTargetPath == "" {
		return nil, invalid("volume id or staging path is missing")
	}
	m, err := d.onlyForDevices()
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := m.unstage(q.VolumeId, q.StagingTargetPath); err != nil { // also of a volume that has no record any more
		return nil, internal(err)
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

func (d *driver) NodePublishVolume(_ context.Context, q *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if q.VolumeId == "" || q.TargetPath == "" || q.VolumeCapability == nil || (d.hasDevices() && q.StagingTargetPath == "") {
		return nil, invalid("volume id, target path, staging path or capability is missing")
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := load[volume](d.records, q.VolumeId)
	if err != nil {
		return nil, missing(err, "volume", q.VolumeId)
	}
	mounted, err := isMounted(q.TargetPath)
	if err != nil {
		return nil, internal(err)
	}
	if mounted {
		return &csi.NodePublishVolumeResponse{}, nil
	}
	single := q.VolumeCapability.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	if err := v.mayPublish(q.TargetPath, single); err != nil {
		return nil, err
	}
	block := q.VolumeCapability.GetBlock() != nil
	source, err := d.medium.source(v, q.StagingTargetPath, block)
	if err != nil {
		return nil, internal(err)
	}
	if block {
		err = makeFile(q.TargetPath)
	} else {
		err = os.MkdirAll(q.TargetPath, 0o750)
	}
	if err == nil {
		err = bind(source, q.TargetPath, q.Readonly)
	}
	if err != nil {
		return nil, internal(err)
	}
	if v.Published == nil {
		v.Published = map[string]bool{}
	}
	v.Published[q.TargetPath] = single
	if err := save(d.records, v.ID, *v); err != nil {
		return nil, internal(err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// mayPublish refuses a second target when one of the two wants to be the single writer.
func (v *volume) mayPublish(target string, single bool) error {
	for path, other := range v.Published {
		if path == target || (!single && !other) {
			continue
		}
		mounted, err := isMounted(path)
		if err != nil {
			return internal(err)
		}
		if mounted {
			return status.Errorf(codes.FailedPrecondition, "volume %q is published at %s", v.ID, path)
		}
	}
	return nil
}

func makeFile(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}

func bind(source, target string, readOnly bool) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return &os.PathError{Op: "bind mount", Path: target, Err: err}
	}
	if !readOnly {
		return nil
	}
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return errors.Join(&os.PathError{Op: "make read-only", Path: target, Err: err}, unmount(target))
	}
	return nil
}

func (d *driver) NodeUnpublishVolume(_ context.Context, q *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if q.VolumeId == "" || q.TargetPath == "" {
		return nil, invalid("volume id or target path is missing")
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := errors.Join(unmount(q.TargetPath), removeFile(q.TargetPath)); err != nil {
		return nil, internal(err)
	}
	v, err := load[volume](d.records, q.VolumeId)
	if errors.Is(err, os.ErrNotExist) {
		return &csi.NodeUnpublishVolumeResponse{}, nil
	}
	if err == nil {
		delete(v.Published, q.TargetPath)
		err = save(d.records, v.ID, *v)
	}
	if err != nil {
		return nil, internal(err)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

func (d *driver) NodeExpandVolume(_ context.Context, q *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if q.VolumeId == "" || q.VolumePath == "" {
		return nil, invalid("volume id or path is missing")
	}
	r := &csi.NodeExpandVolumeResponse{}
	err := d.locked(q.VolumeId, func(m devices, v *volume) error {
		if _, err := os.Stat(q.VolumePath); err != nil {
			return missing(err, "volume path", q.VolumePath)
		}
		r.CapacityBytes = v.Size
		return m.grow(v, q.VolumePath)
	})
	if err != nil {
		return nil, internal(err)
	}
	return r, nil
}

func (d *driver) NodeGetVolumeStats(_ context.Context, q *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if q.VolumeId == "" || q.VolumePath == "" {
		return nil, invalid("volume id or path is missing")
	}
	v, err := load[volume](d.records, q.VolumeId)
	if err != nil {
		return nil, missing(err, "volume", q.VolumeId)
	}
	if _, err := os.Stat(q.VolumePath); err != nil {
		return nil, missing(err, "volume path", q.VolumePath)
	}
	if v.Block {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: v.Size}}}, nil
	}
	var s unix.Statfs_t
	if err := unix.Statfs(q.VolumePath, &s); err != nil {
		return nil, internal(err)
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: int64(s.Blocks) * s.Bsize, Available: int64(s.Bavail) * s.Bsize, Used: int64(s.Blocks-s.Bfree) * s.Bsize},
		{Unit: csi.VolumeUsage_INODES, Total: int64(s.Files), Available: int64(s.Ffree), Used: int64(s.Files - s.Ffree)},
	}}, nil
}
