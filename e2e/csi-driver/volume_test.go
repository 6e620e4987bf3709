//go:build pool

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const mib = 1 << 20

func random(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotRestore: the file as it was, in a volume twice as large, beside the live one.
func TestSnapshotRestore(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fsType, func(t *testing.T) {
			c := dial(t)
			v := c.newMounted(fsType, 320*mib, "")
			file := filepath.Join(v.path, "f")
			want := random(t, mib)
			must(t, os.WriteFile(file, want, 0o600))
			unix.Sync()
			s := c.newSnapshot(v.id, nil)
			must(t, os.WriteFile(file, []byte("later"), 0o600))
			if fsType == "btrfs" { // the kernel refuses a second btrfs of the same UUID while the first is mounted
				v.unmount()
			}
			r := c.newMounted(fsType, 640*mib, s)
			got, err := os.ReadFile(filepath.Join(r.path, "f"))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("restored file has other content (%v)", err)
			}
			if n := sizeOf(t, r.path); n < 500*mib {
				t.Errorf("restored file system has only %d bytes", n)
			}
		})
	}
}

func sizeOf(t *testing.T, path string) int64 {
	t.Helper()
	var s unix.Statfs_t
	must(t, unix.Statfs(path, &s))
	return int64(s.Blocks) * s.Bsize
}

// TestGrowth: online where the kernel allows it, at the next staging with ext4.
func TestGrowth(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs", block} {
		t.Run(kind, func(t *testing.T) {
			c := dial(t)
			v := c.newMounted(kind, 320*mib, "")
			_, err := c.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: &csi.CapacityRange{RequiredBytes: 640 * mib}})
			must(t, err)
			_, err = c.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.path, VolumeCapability: capability(kind)})
			if kind == "ext4" && status.Code(err) == codes.FailedPrecondition { // no CAP_SYS_RESOURCE
				v.unmount()
				err = v.mount()
			}
			must(t, err)
			var size int64
			if kind == block {
				f, err := os.Open(v.path)
				must(t, err)
				defer f.Close()
				size, err = f.Seek(0, io.SeekEnd)
				must(t, err)
			} else {
				size = sizeOf(t, v.path)
			}
			if size < 500*mib {
				t.Errorf("only %d bytes after the growth", size)
			}
		})
	}
}

func TestFullVolume(t *testing.T) {
	v := dial(t).newMounted("ext4", 16*mib, "")
	if err := os.WriteFile(filepath.Join(v.path, "f"), random(t, 32*mib), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("32 MiB into 16 MiB: %v", err)
	}
}

func TestDeleteInUse(t *testing.T) {
	c := dial(t)
	v := c.newMounted("ext4", 16*mib, "")
	if _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a mounted volume was deleted: %v", err)
	}
}

// delta gives the numbers of the blocks that are reported as changed.
func delta(t *testing.T, c *client, base, target string) map[int64]bool {
	t.Helper()
	s, err := c.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, MaxResults: 10})
	must(t, err)
	blocks := map[int64]bool{}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return blocks
		}
		must(t, err)
		if len(r.BlockMetadata) > 10 {
			t.Fatalf("%d ranges in a reply", len(r.BlockMetadata))
		}
		for _, b := range r.BlockMetadata {
			for at := b.ByteOffset; at < b.ByteOffset+b.SizeBytes; at += blockSize {
				blocks[at/blockSize] = true
			}
		}
	}
}

// TestChangedBlocks: exactly the blocks that were written; with the fault one range less.
func TestChangedBlocks(t *testing.T) {
	c := dial(t)
	v := c.newMounted(block, 64*mib, "")
	f, err := os.OpenFile(v.path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	_, err = f.WriteAt(random(t, 32*mib), 0)
	must(t, err)
	must(t, f.Sync())
	base := c.newSnapshot(v.id, nil)
	want := map[int64]bool{}
	for i := int64(0); i < 100; i++ {
		at := i * i % (64 * mib / blockSize) // old and new areas, alone and side by side
		_, err := f.WriteAt(random(t, blockSize), at*blockSize)
		must(t, err)
		want[at] = true
	}
	must(t, f.Sync())
	exact := c.newSnapshot(v.id, nil)
	if got := delta(t, c, base, exact); !maps.Equal(got, want) {
		t.Errorf("got blocks %v, want %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	lying := c.newSnapshot(v.id, map[string]string{"changedBlocks": "incomplete"})
	got := delta(t, c, base, lying)
	if len(got) >= len(want) {
		t.Errorf("the fault hid nothing: %d blocks of %d", len(got), len(want))
	}
	other := c.newMounted(block, 64*mib, "")
	foreign := c.newSnapshot(other.id, nil)
	s, err := c.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: foreign, TargetSnapshotId: exact})
	must(t, err)
	if _, err := s.Recv(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("delta between two volumes: %v", err)
	}
}

func TestFaultFailures(t *testing.T) {
	c := dial(t)
	v := c.newMounted("ext4", 16*mib, "")
	q := &csi.CreateSnapshotRequest{Name: name("s"), SourceVolumeId: v.id, Parameters: map[string]string{"failures": "2"}}
	for range 2 {
		if _, err := c.CreateSnapshot(ctx, q); status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "injected") {
			t.Fatalf("got %v", err)
		}
	}
	r, err := c.CreateSnapshot(ctx, q)
	must(t, err)
	c.dropLater(r.Snapshot.SnapshotId)
}

func TestFaultReadyAfter(t *testing.T) {
	c := dial(t)
	v := c.newMounted("ext4", 16*mib, "")
	q := &csi.CreateSnapshotRequest{Name: name("s"), SourceVolumeId: v.id, Parameters: map[string]string{"readyAfter": "1s"}}
	r, err := c.CreateSnapshot(ctx, q)
	must(t, err)
	id := r.Snapshot.SnapshotId
	c.dropLater(id)
	_, err = c.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: name("v"), VolumeCapabilities: []*csi.VolumeCapability{capability("ext4")},
		VolumeContentSource: &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}})
	if r.Snapshot.ReadyToUse || status.Code(err) != codes.Unavailable {
		t.Errorf("at once: ready=%v, restore: %v", r.Snapshot.ReadyToUse, err)
	}
	for start := time.Now(); !r.Snapshot.ReadyToUse; time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatal("never ready")
		}
		r, err = c.CreateSnapshot(ctx, q) // as the sidecar asks again
		must(t, err)
	}
}

// TestFaultDelay: a snapshot that hangs stops neither other calls nor its own cancellation.
func TestFaultDelay(t *testing.T) {
	c := dial(t)
	v := c.newMounted("ext4", 16*mib, "")
	short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := c.CreateSnapshot(short, &csi.CreateSnapshotRequest{Name: name("s"), SourceVolumeId: v.id, Parameters: map[string]string{"delay": "1h"}})
		ended <- err
	}()
	c.newMounted("ext4", 16*mib, "")
	select {
	case err := <-ended:
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the call did not end with its deadline")
	}
}
