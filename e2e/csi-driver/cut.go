package main

import (
	"context"
	"errors"
	"os"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// wanted is one snapshot that a cut is to make.
type wanted struct{ id, name, volume string }

// inject waits or fails as the class asks. The lock is not held during the wait: a call that hangs
// must not stop the nodes from mounting.
func (d *driver) inject(ctx context.Context, id string, p cutParameters) error {
	if err := pause(ctx, p.delay); err != nil {
		return err
	}
	if p.failures == 0 {
		return nil
	}
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	n := attempts{}
	switch old, err := load[attempts](d.records, id); {
	case err == nil:
		n = *old
	case !errors.Is(err, os.ErrNotExist):
		return internal(err)
	}
	if n.Failed >= p.failures {
		return nil
	}
	n.Failed++
	if err := save(d.records, id, n); err != nil {
		return internal(err)
	}
	return status.Errorf(codes.Internal, "injected failure %d of %d", n.Failed, p.failures)
}

// cut takes all snapshots at one point in time (unless the mode is torn) and records them.
// The caller holds the lock.
func (d *driver) cut(all []wanted, groupID string, p cutParameters) ([]*snapshot, error) {
	var volumes []*volume
	for _, w := range all {
		v, err := load[volume](d.records, w.volume)
		if err != nil {
			return nil, missing(err, "volume", w.volume)
		}
		volumes = append(volumes, v)
	}
	if err := d.medium.cut(all, p.mode); err != nil {
		return nil, internal(err)
	}
	var made []*snapshot
	now := time.Now()
	for i, w := range all {
		s := &snapshot{ID: w.id, Name: w.name, Volume: w.volume, Group: groupID, Size: volumes[i].Size, Claim: volumes[i].Claim,
			Created: now, ReadyAt: now.Add(p.readyAfter), HideOneChange: p.hideOneChange}
		if err := save(d.records, s.ID, *s); err != nil {
			return nil, internal(err)
		}
		made = append(made, s)
	}
	return made, nil
}
