package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func (d *driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	r := &csi.ControllerGetCapabilitiesResponse{}
	all := []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	}
	if d.hasDevices() {
		all = append(all, csi.ControllerServiceCapability_RPC_PUBLISH_UNPUBLISH_VOLUME)
	}
	for _, t := range all {
		r.Capabilities = append(r.Capabilities, &csi.ControllerServiceCapability{Type: &csi.ControllerServiceCapability_Rpc{
			Rpc: &csi.ControllerServiceCapability_RPC{Type: t}}})
	}
	return r, nil
}

// sizeFor rounds up to whole blocks and to the least that a volume of its kind has.
func sizeFor(r *csi.CapacityRange, least, capacity int64) (int64, error) {
	size := max((r.GetRequiredBytes()+4095)&^4095, least)
	if limit := r.GetLimitBytes(); limit > 0 && size > limit {
		return 0, status.Errorf(codes.OutOfRange, "limit of %d bytes is below the %d that are needed", limit, size)
	}
	if size > capacity {
		return 0, status.Errorf(codes.OutOfRange, "%d bytes exceed the pool's capacity of %d", size, capacity)
	}
	return size, nil
}

func (d *driver) CreateVolume(_ context.Context, q *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if q.Name == "" {
		return nil, invalid("name is missing")
	}
	kind, err := d.medium.usable(q.VolumeCapabilities)
	if err != nil {
		return nil, err
	}
	if t := q.Parameters["csi.storage.k8s.io/fstype"]; t != "" {
		kind.fsType = t
	}
	if err := onlyKnown(q.Parameters); err != nil {
		return nil, err
	}
	least, err := d.medium.smallest(kind)
	if err != nil {
		return nil, err
	}
	size, err := sizeFor(q.CapacityRange, least, d.capacity)
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	v := volume{ID: recordID(q.Name), Name: q.Name, Size: size, Block: kind.block, FsType: kind.fsType, ReadOnly: kind.readOnly,
		Claim: claimIn(q.Parameters), Created: time.Now(),
		SourceSnapshot: q.GetVolumeContentSource().GetSnapshot().GetSnapshotId(),
		SourceVolume:   q.GetVolumeContentSource().GetVolume().GetVolumeId()}
	switch old, err := load[volume](d.records, v.ID); {
	case err == nil:
		limit := q.CapacityRange.GetLimitBytes()
		if old.Size < q.CapacityRange.GetRequiredBytes() || (limit > 0 && old.Size > limit) ||
			old.SourceSnapshot != v.SourceSnapshot || old.SourceVolume != v.SourceVolume || old.Block != kind.block || old.ReadOnly != kind.readOnly {
			return nil, status.Errorf(codes.AlreadyExists, "volume %q exists with other properties", q.Name)
		}
		return &csi.CreateVolumeResponse{Volume: d.describe(old)}, nil
	case !errors.Is(err, os.ErrNotExist):
		return nil, internal(err)
	}
	if d.topology {
		if v.Node, err = d.chooseNode(q.AccessibilityRequirements); err != nil {
			return nil, err
		}
	}
	from, err := d.sourceOf(&v)
	if err != nil {
		return nil, err
	}
	if err := d.medium.create(&v, from); err != nil {
		return nil, internal(err)
	}
	if err := save(d.records, v.ID, v); err != nil {
		return nil, internal(err)
	}
	return &csi.CreateVolumeResponse{Volume: d.describe(&v)}, nil
}

// sourceOf is the path that a volume's content comes from, "" for an empty volume.
func (d *driver) sourceOf(v *volume) (string, error) {
	var path string
	var size int64
	switch {
	case v.SourceSnapshot != "":
		s, err := load[snapshot](d.records, v.SourceSnapshot)
		if err != nil {
			return "", missing(err, "snapshot", v.SourceSnapshot)
		}
		if !s.ready(time.Now()) {
			return "", status.Errorf(codes.Unavailable, "snapshot %q is not ready to use", s.ID)
		}
		path, size = d.medium.snapshotPath(s.ID), s.Size
	case v.SourceVolume != "":
		s, err := load[volume](d.records, v.SourceVolume)
		if err != nil {
			return "", missing(err, "volume", v.SourceVolume)
		}
		path, size = d.medium.volumePath(s.ID), s.Size
	}
	if size > v.Size {
		return "", status.Errorf(codes.OutOfRange, "%d bytes are smaller than the source with %d", v.Size, size)
	}
	return path, nil
}

// chooseNode takes the first that is preferred, else the first that is allowed, else this one.
func (d *driver) chooseNode(r *csi.TopologyRequirement) (string, error) {
	asked := append(append([]*csi.Topology{}, r.GetPreferred()...), r.GetRequisite()...)
	for _, t := range asked {
		if n := t.GetSegments()[d.topologyKey()]; n != "" {
			return n, nil
		}
	}
	if len(asked) > 0 {
		return "", status.Errorf(codes.ResourceExhausted, "no requirement names %s", d.topologyKey())
	}
	return d.nodeID, nil
}

func (d *driver) describe(v *volume) *csi.Volume {
	r := &csi.Volume{VolumeId: v.ID, CapacityBytes: v.Size}
	switch {
	case v.SourceSnapshot != "":
		r.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.SourceSnapshot}}}
	case v.SourceVolume != "":
		r.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.SourceVolume}}}
	}
	if d.topology {
		r.AccessibleTopology = []*csi.Topology{d.topologyOf(v.Node)}
	}
	return r
}

func (d *driver) DeleteVolume(_ context.Context, q *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if q.VolumeId == "" {
		return nil, invalid("volume id is missing")
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := load[volume](d.records, q.VolumeId)
	if errors.Is(err, os.ErrNotExist) {
		return &csi.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, internal(err)
	}
	user, err := d.medium.user(v)
	if err != nil {
		return nil, internal(err)
	}
	if user != "" {
		return nil, status.Errorf(codes.FailedPrecondition, "volume %q is in use as %s", v.ID, user)
	}
	if err := errors.Join(d.medium.destroy(d.medium.volumePath(v.ID)), remove[volume](d.records, v.ID)); err != nil {
		return nil, internal(err)
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func (d *driver) ControllerPublishVolume(_ context.Context, q *csi.ControllerPublishVolumeRequest) (*csi.ControllerPublishVolumeResponse, error) {
	if q.VolumeId == "" || q.NodeId == "" || q.VolumeCapability == nil {
		return nil, invalid("volume id, node id or capability is missing")
	}
	if _, err := d.onlyForDevices(); err != nil {
		return nil, err
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
	if _, err := load[node](d.records, recordID(q.NodeId)); err != nil {
		return nil, missing(err, "node", q.NodeId)
	}
	if v.Attached != "" && v.Attached != q.NodeId {
		return nil, status.Errorf(codes.FailedPrecondition, "volume %q is attached to node %s", v.ID, v.Attached)
	}
	if d.topology && v.Node != q.NodeId {
		return nil, status.Errorf(codes.FailedPrecondition, "volume %q is local to node %s", v.ID, v.Node)
	}
	v.Attached = q.NodeId
	if err := save(d.records, v.ID, *v); err != nil {
		return nil, internal(err)
	}
	return &csi.ControllerPublishVolumeResponse{}, nil
}

func (d *driver) ControllerUnpublishVolume(_ context.Context, q *csi.ControllerUnpublishVolumeRequest) (*csi.ControllerUnpublishVolumeResponse, error) {
	if q.VolumeId == "" {
		return nil, invalid("volume id is missing")
	}
	if _, err := d.onlyForDevices(); err != nil {
		return nil, err
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := load[volume](d.records, q.VolumeId)
	if errors.Is(err, os.ErrNotExist) {
		return &csi.ControllerUnpublishVolumeResponse{}, nil
	}
	if err == nil && (q.NodeId == "" || v.Attached == q.NodeId) {
		v.Attached = ""
		err = save(d.records, v.ID, *v)
	}
	if err != nil {
		return nil, internal(err)
	}
	return &csi.ControllerUnpublishVolumeResponse{}, nil
}

func (d *driver) ValidateVolumeCapabilities(_ context.Context, q *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if q.VolumeId == "" || len(q.VolumeCapabilities) == 0 {
		return nil, invalid("volume id or capabilities are missing")
	}
	v, err := load[volume](d.records, q.VolumeId)
	if err != nil {
		return nil, missing(err, "volume", q.VolumeId)
	}
	kind, err := d.medium.usable(q.VolumeCapabilities)
	if err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	if kind.block != v.Block {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: "the volume has the other access type"}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: q.VolumeContext, VolumeCapabilities: q.VolumeCapabilities, Parameters: q.Parameters}}, nil
}

func (d *driver) GetCapacity(context.Context, *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	all, err := list[volume](d.records)
	if err != nil {
		return nil, internal(err)
	}
	free := d.capacity
	for _, v := range all {
		free -= v.Size
	}
	return &csi.GetCapacityResponse{AvailableCapacity: max(free, 0)}, nil
}

func (d *driver) ControllerExpandVolume(_ context.Context, q *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if q.VolumeId == "" || q.CapacityRange == nil {
		return nil, invalid("volume id or capacity is missing")
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
	least, err := d.medium.smallest(volumeKind{block: v.Block, fsType: v.FsType})
	if err != nil {
		return nil, err
	}
	size, err := sizeFor(q.CapacityRange, least, d.capacity)
	if err != nil {
		return nil, err
	}
	if size > v.Size {
		v.Size = size
		if err := errors.Join(d.medium.resize(v), save(d.records, v.ID, *v)); err != nil {
			return nil, internal(err)
		}
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Size, NodeExpansionRequired: d.hasDevices()}, nil
}
