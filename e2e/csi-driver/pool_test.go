//go:build pool

// Tests with this tag drive the built program on a real pool; test.sh prepares both.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var (
	work   = os.Getenv("LIFEBOAT_CSI_WORK") // holds pool/, on btrfs
	socket = filepath.Join(work, "csi.sock")
	ctx    = context.Background()
	serial atomic.Int64
)

func TestMain(m *testing.M) {
	code, err := withDriver(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test driver:", err)
		code = 1
	}
	os.Exit(code)
}

// withDriver fails also when the driver does not end cleanly.
func withDriver(run func() int) (int, error) {
	c, err := startDriver("n1", socket, strings.Fields(os.Getenv("LIFEBOAT_CSI_FLAGS"))...)
	if err != nil {
		return 1, err
	}
	code := run()
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		return 1, err
	}
	return code, c.Wait()
}

// startDriver returns when the instance serves.
func startDriver(node, socket string, more ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(filepath.Join(work, "driver.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := append([]string{"--endpoint", "unix://" + socket, "--node-id", node, "--pool", filepath.Join(work, "pool")}, more...)
	c := exec.Command(filepath.Join(work, "lifeboat-test-csi"), args...)
	c.Stderr = log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		return nil, err
	}
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(10 * time.Millisecond) {
		if l, err := net.Dial("unix", socket); err == nil {
			return c, l.Close()
		}
	}
	return nil, fmt.Errorf("nobody listens on %s; see %s (%v)", socket, log.Name(), c.Process.Kill())
}

// client calls the driver as the sidecars and the kubelet do.
type client struct {
	t testing.TB
	csi.ControllerClient
	csi.GroupControllerClient
	csi.NodeClient
	csi.SnapshotMetadataClient
}

func dial(t testing.TB) *client {
	t.Helper()
	return dialAt(t, socket)
}

func dialAt(t testing.TB, socket string) *client {
	t.Helper()
	c, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return &client{t, csi.NewControllerClient(c), csi.NewGroupControllerClient(c), csi.NewNodeClient(c), csi.NewSnapshotMetadataClient(c)}
}

const block = "block" // in place of a file system

func capability(kind string) *csi.VolumeCapability {
	if kind != block {
		return mountCapability(kind)
	}
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

func name(what string) string { return fmt.Sprintf("%s-%d-%d", what, os.Getpid(), serial.Add(1)) }

// mounted is a volume in use, at path: a folder, or a block device's node.
type mounted struct {
	c              *client
	id, kind, path string
}

func (c *client) create(kind string, size int64, fromSnapshot string) *mounted {
	c.t.Helper()
	q := &csi.CreateVolumeRequest{Name: name("v"), VolumeCapabilities: []*csi.VolumeCapability{capability(kind)},
		CapacityRange: &csi.CapacityRange{RequiredBytes: size}}
	if fromSnapshot != "" {
		q.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: fromSnapshot}}}
	}
	r, err := c.CreateVolume(ctx, q)
	if err != nil {
		c.t.Fatal(err)
	}
	return &mounted{c, r.Volume.VolumeId, kind, filepath.Join(work, "target", r.Volume.VolumeId)}
}

func (m *mounted) staging() string { return filepath.Join(work, "staging", m.id) }

func (m *mounted) mount() error {
	if _, err := m.c.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: m.id, StagingTargetPath: m.staging(), VolumeCapability: capability(m.kind)}); err != nil {
		return err
	}
	_, err := m.c.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: m.id, StagingTargetPath: m.staging(), TargetPath: m.path, VolumeCapability: capability(m.kind)})
	return err
}

func (m *mounted) unmount() {
	m.c.t.Helper()
	if _, err := m.c.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: m.id, TargetPath: m.path}); err != nil {
		m.c.t.Error(err)
	}
	if _, err := m.c.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: m.id, StagingTargetPath: m.staging()}); err != nil {
		m.c.t.Error(err)
	}
}

func (m *mounted) drop() {
	m.c.t.Helper()
	m.unmount()
	if _, err := m.c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: m.id}); err != nil {
		m.c.t.Error(err)
	}
}

// newMounted is unmounted and deleted at the end of the test.
func (c *client) newMounted(kind string, size int64, fromSnapshot string) *mounted {
	c.t.Helper()
	m := c.create(kind, size, fromSnapshot)
	c.t.Cleanup(m.drop)
	if err := m.mount(); err != nil {
		c.t.Fatal(err)
	}
	return m
}

func (c *client) newSnapshot(volume string, parameters map[string]string) string {
	c.t.Helper()
	r, err := c.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name("s"), SourceVolumeId: volume, Parameters: parameters})
	if err != nil {
		c.t.Fatal(err)
	}
	c.dropLater(r.Snapshot.SnapshotId)
	return r.Snapshot.SnapshotId
}

func (c *client) dropLater(snapshotID string) {
	c.t.Cleanup(func() {
		if _, err := c.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshotID}); err != nil {
			c.t.Error(err)
		}
	})
}
