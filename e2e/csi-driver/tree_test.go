//go:build pool

package main

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	shared   = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	readOnly = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
)

// treeNode is an instance of the driver of file trees; all of them share a pool beside the images'.
func treeNode(t *testing.T, node string) *client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "csi.sock")
	p, err := startDriver(node, socket, "--pool", filepath.Join(work, "pool", "trees"), "--trees")
	must(t, err)
	t.Cleanup(func() {
		must(t, p.Process.Signal(syscall.SIGTERM))
		must(t, p.Wait())
	})
	return dialAt(t, socket)
}

func (c *client) newTree(mode csi.VolumeCapability_AccessMode_Mode, fromSnapshot string) string {
	c.t.Helper()
	q := &csi.CreateVolumeRequest{Name: name("t"), VolumeCapabilities: []*csi.VolumeCapability{withMode(mode, mountCapability(""))}}
	if fromSnapshot != "" {
		q.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: fromSnapshot}}}
	}
	r, err := c.CreateVolume(ctx, q)
	must(c.t, err)
	c.t.Cleanup(func() {
		_, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: r.Volume.VolumeId})
		must(c.t, err)
	})
	return r.Volume.VolumeId
}

// publish shows a tree at a path until the end of the test.
func (c *client) publish(id string, mode csi.VolumeCapability_AccessMode_Mode) string {
	c.t.Helper()
	path := filepath.Join(c.t.TempDir(), "target")
	_, err := c.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: id, TargetPath: path, VolumeCapability: withMode(mode, mountCapability(""))})
	must(c.t, err)
	c.t.Cleanup(func() {
		_, err := c.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: path})
		must(c.t, err)
	})
	return path
}

// TestSharedTree: two nodes write one volume; a snapshot of it is mounted at once, read-only, as it was.
func TestSharedTree(t *testing.T) {
	one, two := treeNode(t, "n1"), treeNode(t, "n2")
	id := one.newTree(shared, "")
	a, b := one.publish(id, shared), two.publish(id, shared)
	must(t, os.WriteFile(filepath.Join(a, "f"), []byte("from n1"), 0o600))
	if got, err := os.ReadFile(filepath.Join(b, "f")); string(got) != "from n1" {
		t.Errorf("the other node reads %q %v", got, err)
	}
	s := one.newSnapshot(id, nil)
	must(t, os.WriteFile(filepath.Join(b, "f"), []byte("later"), 0o600))
	r := two.publish(two.newTree(readOnly, s), readOnly)
	if got, err := os.ReadFile(filepath.Join(r, "f")); string(got) != "from n1" {
		t.Errorf("the snapshot has %q %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(r, "g"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("written to a snapshot: %v", err)
	}
	w := one.publish(one.newTree(shared, s), shared)
	must(t, os.WriteFile(filepath.Join(w, "f"), []byte("restored"), 0o600))
	if _, err := one.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("deleted while it is used: %v", err)
	}
}

func TestTreesHaveNoDevices(t *testing.T) {
	c := treeNode(t, "n1")
	_, err := c.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: name("t"), VolumeCapabilities: []*csi.VolumeCapability{capability(block)}})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("raw block: %v", err)
	}
	_, err = c.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{"v"}})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("group snapshot: %v", err)
	}
	_, err = c.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: "v", StagingTargetPath: "/x", VolumeCapability: capability("")})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("stage: %v", err)
	}
	id := c.newTree(shared, "")
	must(t, os.WriteFile(filepath.Join(c.publish(id, shared), "f"), []byte("x"), 0o600))
	if _, err := c.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name("s"), SourceVolumeId: id, Parameters: map[string]string{"mode": modeFrozen}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("frozen: %v", err)
	}
	torn := c.publish(c.newTree(readOnly, c.newSnapshot(id, map[string]string{"mode": modeTorn})), readOnly)
	if got, err := os.ReadFile(filepath.Join(torn, "f")); string(got) != "x" {
		t.Errorf("a torn copy at rest has %q %v", got, err)
	}
}
