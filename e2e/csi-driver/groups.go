package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (d *driver) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{{
		Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{
			Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}}}}}, nil
}

func (d *driver) CreateVolumeGroupSnapshot(ctx context.Context, q *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	if q.Name == "" || len(q.SourceVolumeIds) == 0 {
		return nil, invalid("name or source volumes are missing")
	}
	p, err := parseCut(q.Parameters)
	if err != nil {
		return nil, err
	}
	id := recordID(q.Name)
	sources := slices.Sorted(slices.Values(q.SourceVolumeIds))
	if found, err := d.existingGroup(id, sources); found != nil || err != nil {
		return found, err
	}
	if err := d.inject(ctx, id, p); err != nil {
		return nil, err
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if found, err := d.existingGroup(id, sources); found != nil || err != nil {
		return found, err
	}
	g := group{ID: id, Name: q.Name, Volumes: sources}
	var all []wanted
	for i, v := range sources {
		w := wanted{fmt.Sprintf("%s-%d", id, i), fmt.Sprintf("%s-%d", q.Name, i), v}
		all = append(all, w)
		g.Snapshots = append(g.Snapshots, w.id)
	}
	made, err := d.cut(all, id, p)
	if err != nil {
		return nil, err
	}
	g.Created = made[0].Created
	if err := save(d.records, id, g); err != nil {
		return nil, internal(err)
	}
	r, err := d.describeGroup(&g)
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: r}, nil
}

// existingGroup gives nil without an error when there is none.
func (d *driver) existingGroup(id string, sources []string) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	g, err := load[group](d.records, id)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, internal(err)
	case !slices.Equal(g.Volumes, sources):
		return nil, status.Errorf(codes.AlreadyExists, "group snapshot %q is one of other volumes", g.Name)
	}
	r, err := d.describeGroup(g)
	if err != nil {
		return nil, err
	}
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: r}, nil
}

func (d *driver) describeGroup(g *group) (*csi.VolumeGroupSnapshot, error) {
	r := &csi.VolumeGroupSnapshot{GroupSnapshotId: g.ID, CreationTime: timestamppb.New(g.Created), ReadyToUse: true}
	for _, id := range g.Snapshots {
		s, err := load[snapshot](d.records, id)
		if err != nil {
			return nil, missing(err, "snapshot", id)
		}
		m := s.describe()
		r.Snapshots = append(r.Snapshots, m)
		r.ReadyToUse = r.ReadyToUse && m.ReadyToUse
	}
	return r, nil
}

func (d *driver) DeleteVolumeGroupSnapshot(_ context.Context, q *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	if q.GroupSnapshotId == "" {
		return nil, invalid("group snapshot id is missing")
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	g, err := load[group](d.records, q.GroupSnapshotId)
	if errors.Is(err, os.ErrNotExist) {
		return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, internal(err)
	}
	for _, s := range g.Snapshots {
		err = errors.Join(err, d.discard(s))
	}
	if err == nil { // the group's record goes last, so that a deletion can be tried again
		err = errors.Join(remove[attempts](d.records, g.ID), remove[group](d.records, g.ID))
	}
	if err != nil {
		return nil, internal(err)
	}
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

func (d *driver) GetVolumeGroupSnapshot(_ context.Context, q *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	if q.GroupSnapshotId == "" {
		return nil, invalid("group snapshot id is missing")
	}
	g, err := load[group](d.records, q.GroupSnapshotId)
	if err != nil {
		return nil, missing(err, "group snapshot", q.GroupSnapshotId)
	}
	r, err := d.describeGroup(g)
	if err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: r}, nil
}
