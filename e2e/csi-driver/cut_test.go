//go:build pool

package main

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

const cutsPerCase = 8

// TestGroupCut restores group snapshots that were taken while a writer wrote. Cuts must all show a
// prefix of what it wrote; copies one after the other (torn) must be caught not to.
func TestGroupCut(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", block} {
		for _, mode := range []string{modeCrash, modeFrozen, modeTorn} {
			t.Run(kind+"/"+mode, func(t *testing.T) {
				broken, first := brokenCuts(t, kind, mode)
				t.Logf("%d of %d group snapshots are not a prefix; first: %v", broken, cutsPerCase, first)
				if mode == modeTorn && broken == 0 {
					t.Error("torn copies went unnoticed: this test cannot tell a cut from a copy")
				}
				if mode != modeTorn && broken > 0 {
					t.Errorf("a cut showed something else than a prefix: %v", first)
				}
			})
		}
	}
}

func brokenCuts(t *testing.T, kind, mode string) (broken int, first error) {
	c := dial(t)
	const size = 320 << 20
	a, b := c.newMounted(kind, size, ""), c.newMounted(kind, size, "")
	w := startWriter(t, a, b)
	defer w.finish(t)
	for range cutsPerCase {
		for from := w.done.Load(); w.done.Load() < from+4; { // the writer is at it
			time.Sleep(time.Millisecond)
		}
		time.Sleep(rand.N(20 * time.Millisecond))
		done := w.done.Load()
		r, err := c.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name("g"),
			SourceVolumeIds: []string{a.id, b.id}, Parameters: map[string]string{"mode": mode}})
		if err != nil {
			t.Fatal(err)
		}
		if err := restoredPrefix(t, c, kind, size, r.GroupSnapshot, a.id, b.id, done, w.begun.Load()); err != nil {
			if broken++; first == nil {
				first = err
			}
		}
	}
	return broken, first
}

// restoredPrefix leaves neither the group snapshot nor the restored volumes.
func restoredPrefix(t *testing.T, c *client, kind string, size int64, g *csi.VolumeGroupSnapshot, a, b string, done, begun int64) error {
	t.Helper()
	of := map[string]string{}
	var ids []string
	for _, s := range g.Snapshots {
		of[s.SourceVolumeId] = s.SnapshotId
		ids = append(ids, s.SnapshotId)
	}
	if !g.ReadyToUse || len(ids) != 2 || of[a] == "" || of[b] == "" {
		t.Fatalf("group snapshot: %v", g)
	}
	defer func() {
		if _, err := c.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GroupSnapshotId, SnapshotIds: ids}); err != nil {
			t.Error(err)
		}
	}()
	ra, rb := c.create(kind, size, of[a]), c.create(kind, size, of[b])
	defer ra.drop()
	defer rb.drop()
	for _, r := range []*mounted{ra, rb} { // beside their sources, which are mounted
		if err := r.mount(); err != nil {
			return err
		}
	}
	return prefix(ra, rb, done, begun)
}
