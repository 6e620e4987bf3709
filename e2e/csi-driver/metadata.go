package main

import (
	"context"
	"log"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	blockSize      = 4096
	rangesPerReply = 256 // when the caller sets no limit
)

func (d *driver) trackable(id string) (*snapshot, error) {
	if id == "" {
		return nil, invalid("snapshot id is missing")
	}
	s, err := load[snapshot](d.records, id)
	if err != nil {
		return nil, missing(err, "snapshot", id)
	}
	if !s.ready(time.Now()) {
		return nil, status.Errorf(codes.Unavailable, "snapshot %q is not ready to use", id)
	}
	return s, nil
}

func (d *driver) GetMetadataAllocated(q *csi.GetMetadataAllocatedRequest, out csi.SnapshotMetadata_GetMetadataAllocatedServer) error {
	s, err := d.trackable(q.SnapshotId)
	if err != nil {
		return err
	}
	lie, err := d.lieAbout(out.Context(), "GetMetadataAllocated", s)
	if err != nil {
		return err
	}
	data, err := extents(d.medium.snapshotPath(s.ID))
	if err != nil {
		return internal(err)
	}
	ranges, send := lying(lie, data, s.Size, func(b []*csi.BlockMetadata) error {
		return out.Send(&csi.GetMetadataAllocatedResponse{BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH,
			VolumeCapacityBytes: s.Size, BlockMetadata: b})
	})
	return replies(ranges, s.Size, q.StartingOffset, int(q.MaxResults), send)
}

func (d *driver) GetMetadataDelta(q *csi.GetMetadataDeltaRequest, out csi.SnapshotMetadata_GetMetadataDeltaServer) error {
	base, err := d.trackable(q.BaseSnapshotId)
	if err != nil {
		return err
	}
	target, err := d.trackable(q.TargetSnapshotId)
	if err != nil {
		return err
	}
	if base.Volume != target.Volume {
		return status.Error(codes.FailedPrecondition, "the snapshots are of different volumes")
	}
	lie, err := d.lieAbout(out.Context(), "GetMetadataDelta", target)
	if err != nil {
		return err
	}
	old, err := extents(d.medium.snapshotPath(base.ID))
	if err != nil {
		return internal(err)
	}
	now, err := extents(d.medium.snapshotPath(target.ID))
	if err != nil {
		return internal(err)
	}
	if lie == "" && target.HideOneChange {
		lie = lieIncomplete
	}
	ranges, send := lying(lie, changed(old, now, target.Size), target.Size, func(b []*csi.BlockMetadata) error {
		return out.Send(&csi.GetMetadataDeltaResponse{BlockMetadataType: csi.BlockMetadataType_VARIABLE_LENGTH,
			VolumeCapacityBytes: target.Size, BlockMetadata: b})
	})
	return replies(ranges, target.Size, q.StartingOffset, int(q.MaxResults), send)
}

// lieAbout is what the faults say about a list of this snapshot's blocks, after they hung or failed it.
func (d *driver) lieAbout(ctx context.Context, call string, s *snapshot) (lie string, err error) {
	all, err := d.faults.before(ctx, call, s.Claim)
	for _, f := range all {
		lie = f.lie
	}
	return lie, err
}

// replies joins neighbouring ranges, leaves out what ends before start, and sends at most limit
// ranges at a time; at least one reply is sent, because it carries the volume's size.
func replies(ranges []extent, size, start int64, limit int, send func([]*csi.BlockMetadata) error) error {
	if start < 0 || start >= size {
		return status.Errorf(codes.OutOfRange, "starting offset %d is outside the volume", start)
	}
	if limit <= 0 {
		limit = rangesPerReply
	}
	start &^= blockSize - 1
	var batch []*csi.BlockMetadata
	for _, x := range ranges {
		from, to := max(x.offset, start), min(x.offset+x.length, size)
		if from >= to {
			continue
		}
		if n := len(batch); n > 0 && batch[n-1].ByteOffset+batch[n-1].SizeBytes == from {
			batch[n-1].SizeBytes += to - from
			continue
		}
		if len(batch) == limit {
			if err := send(batch); err != nil {
				return err
			}
			batch = nil
		}
		batch = append(batch, &csi.BlockMetadata{ByteOffset: from, SizeBytes: to - from})
	}
	return send(batch)
}

// lying changes a list of ranges and how it is sent, as the fault says.
func lying(lie string, ranges []extent, size int64, send func([]*csi.BlockMetadata) error) ([]extent, func([]*csi.BlockMetadata) error) {
	switch lie {
	case lieIncomplete:
		return ranges[:max(len(ranges)-1, 0)], send
	case lieEmpty:
		return nil, send
	case lieBeyond:
		return ranges, func(b []*csi.BlockMetadata) error {
			return send(append(b, &csi.BlockMetadata{ByteOffset: size + blockSize, SizeBytes: blockSize}))
		}
	case lieBroken:
		return ranges, func(b []*csi.BlockMetadata) error {
			if err := send(b[:len(b)/2]); err != nil {
				return err
			}
			log.Print("injected: the stream breaks")
			return status.Error(codes.Unavailable, "injected: the stream breaks")
		}
	}
	return ranges, send
}
