package main

import (
	"context"
	"errors"
	"os"
	"strconv"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (s *snapshot) ready(now time.Time) bool { return !now.Before(s.ReadyAt) }

func (s *snapshot) describe() *csi.Snapshot {
	return &csi.Snapshot{SnapshotId: s.ID, SourceVolumeId: s.Volume, SizeBytes: s.Size, GroupSnapshotId: s.Group,
		CreationTime: timestamppb.New(s.Created), ReadyToUse: s.ready(time.Now())}
}

func (d *driver) CreateSnapshot(ctx context.Context, q *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if q.Name == "" || q.SourceVolumeId == "" {
		return nil, invalid("name or source volume is missing")
	}
	p, err := parseCut(q.Parameters)
	if err != nil {
		return nil, err
	}
	id := recordID(q.Name)
	if found, err := d.existingSnapshot(id, q.SourceVolumeId); found != nil || err != nil {
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
	if found, err := d.existingSnapshot(id, q.SourceVolumeId); found != nil || err != nil {
		return found, err
	}
	made, err := d.cut([]wanted{{id, q.Name, q.SourceVolumeId}}, "", p)
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: made[0].describe()}, nil
}

// existingSnapshot gives nil without an error when there is none.
func (d *driver) existingSnapshot(id, volumeID string) (*csi.CreateSnapshotResponse, error) {
	s, err := load[snapshot](d.records, id)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, internal(err)
	case s.Volume != volumeID:
		return nil, status.Errorf(codes.AlreadyExists, "snapshot %q is one of volume %q", s.Name, s.Volume)
	}
	return &csi.CreateSnapshotResponse{Snapshot: s.describe()}, nil
}

func (d *driver) DeleteSnapshot(_ context.Context, q *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if q.SnapshotId == "" {
		return nil, invalid("snapshot id is missing")
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := load[snapshot](d.records, q.SnapshotId)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return &csi.DeleteSnapshotResponse{}, nil
	case err != nil:
		return nil, internal(err)
	case s.Group != "":
		return nil, invalid("snapshot %q is a member of group snapshot %q", s.ID, s.Group)
	}
	if err := d.discard(s.ID); err != nil {
		return nil, internal(err)
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

func (d *driver) discard(id string) error {
	return errors.Join(d.medium.destroy(d.medium.snapshotPath(id)), remove[snapshot](d.records, id), remove[attempts](d.records, id))
}

func (d *driver) ListSnapshots(_ context.Context, q *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	every, err := list[snapshot](d.records)
	if err != nil {
		return nil, internal(err)
	}
	var matching []*snapshot
	for _, s := range every {
		if (q.SnapshotId == "" || q.SnapshotId == s.ID) && (q.SourceVolumeId == "" || q.SourceVolumeId == s.Volume) {
			matching = append(matching, s)
		}
	}
	from, to, next, err := page(len(matching), q.StartingToken, int(q.MaxEntries))
	if err != nil {
		return nil, err
	}
	r := &csi.ListSnapshotsResponse{NextToken: next}
	for _, s := range matching[from:to] {
		r.Entries = append(r.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s.describe()})
	}
	return r, nil
}

// page: a token is the position of the next entry.
func page(total int, token string, limit int) (from, to int, next string, err error) {
	if token != "" {
		if from, err = strconv.Atoi(token); err != nil || from < 0 || from > total {
			return 0, 0, "", status.Errorf(codes.Aborted, "starting token %q is not one of this listing", token)
		}
	}
	if to = total; limit > 0 && from+limit < total {
		to = from + limit
		next = strconv.Itoa(to)
	}
	return from, to, next, nil
}
