package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// wanted is one snapshot that a cut is to make.
type wanted struct{ id, name, volume string }

// inject waits or fails as the class asks. The lock is not held during the wait: a call that hangs
// must not stop the nodes from mounting.
func (d *driver) inject(ctx context.Context, id string, p cutParameters) error {
	if p.delay > 0 {
		select {
		case <-time.After(p.delay):
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
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
	var err error
	switch p.mode {
	case modeTorn:
		err = d.copyImages(all)
	case modeFrozen:
		err = d.withFrozen(all, func() error { return d.cutImages(all) })
	default:
		err = d.cutImages(all)
	}
	if err != nil {
		return nil, internal(err)
	}
	var made []*snapshot
	now := time.Now()
	for i, w := range all {
		s := &snapshot{ID: w.id, Name: w.name, Volume: w.volume, Group: groupID, Size: volumes[i].Size,
			Created: now, ReadyAt: now.Add(p.readyAfter), HideOneChange: p.hideOneChange}
		if err := save(d.records, s.ID, *s); err != nil {
			return nil, internal(err)
		}
		made = append(made, s)
	}
	return made, nil
}

func (d *driver) cutImages(all []wanted) (err error) {
	if len(all) == 1 {
		return reflink(d.pool.volumeImage(all[0].volume), d.pool.snapshotImage(all[0].id))
	}
	frame := filepath.Join(d.pool.dir, "cut-"+all[0].id)
	if err := snapshotSubvolume(d.pool.volumes(), frame); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, destroySubvolume(frame)) }()
	for _, w := range all {
		if err := reflink(filepath.Join(frame, w.volume+".img"), d.pool.snapshotImage(w.id)); err != nil {
			return err
		}
	}
	return nil
}

// copyImages is the negative control: it copies as a driver does that has no snapshots.
func (d *driver) copyImages(all []wanted) error {
	for _, w := range all {
		if err := command("cp", "--reflink=never", "--sparse=always", d.pool.volumeImage(w.volume), d.pool.snapshotImage(w.id)); err != nil {
			return err
		}
	}
	return nil
}

func (d *driver) withFrozen(all []wanted, do func() error) (err error) {
	for _, w := range all {
		thaw, e := d.pool.freeze(d.pool.volumeImage(w.volume))
		if e != nil {
			return e
		}
		defer func() { err = errors.Join(err, thaw()) }()
	}
	return do()
}
