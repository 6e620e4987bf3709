//go:build pool

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	reg "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// secondNode is an instance on the same pool, killed at the end of the test if it still runs.
func secondNode(t *testing.T, more ...string) (c *client, kill func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "csi.sock")
	p, err := startDriver("n2", socket, more...)
	must(t, err)
	killed := false
	kill = func() {
		if killed {
			return
		}
		killed = true
		must(t, p.Process.Kill())
		if err := p.Wait(); err == nil {
			t.Error("the instance ended by itself")
		}
	}
	t.Cleanup(kill)
	return dialAt(t, socket), kill
}

// TestMove: what one node wrote another one reads; only one at a time may have the volume.
func TestMove(t *testing.T) {
	one := dial(t)
	two, _ := secondNode(t)
	v := one.create("ext4", 16*mib, "")
	attach := func(node string) error {
		_, err := one.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: v.id, NodeId: node, VolumeCapability: capability("ext4")})
		return err
	}
	must(t, attach("n1"))
	must(t, v.mount())
	must(t, os.WriteFile(filepath.Join(v.path, "f"), []byte("from n1"), 0o600))
	if err := attach("n2"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("attached to two nodes: %v", err)
	}
	v.unmount()
	_, err := one.ControllerUnpublishVolume(ctx, &csi.ControllerUnpublishVolumeRequest{VolumeId: v.id, NodeId: "n1"})
	must(t, err)
	must(t, attach("n2"))
	v.c = two
	must(t, v.mount())
	if got, err := os.ReadFile(filepath.Join(v.path, "f")); string(got) != "from n1" {
		t.Errorf("read %q %v", got, err)
	}
	v.drop()
}

// TestLostNode: the device of a killed instance clears itself with its mounts, and the volume is free.
func TestLostNode(t *testing.T) {
	one := dial(t)
	two, kill := secondNode(t)
	v := two.create("ext4", 16*mib, "")
	must(t, v.mount())
	kill()
	must(t, unmount(v.path))
	must(t, unmount(v.staging()))
	v.c = one
	v.drop()
}

func TestRegistration(t *testing.T) {
	dir := t.TempDir()
	secondNode(t, "--registration-dir", dir, "--driver-name", "other.test")
	c, err := grpc.NewClient("unix://"+filepath.Join(dir, "other.test-reg.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer c.Close()
	info, err := reg.NewRegistrationClient(c).GetInfo(ctx, &reg.InfoRequest{}, grpc.WaitForReady(true))
	must(t, err)
	if info.Type != reg.CSIPlugin || info.Name != "other.test" || !filepath.IsAbs(info.Endpoint) {
		t.Errorf("got %v", info)
	}
}

func TestTopology(t *testing.T) {
	two, _ := secondNode(t, "--topology")
	info, err := two.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	must(t, err)
	r, err := two.CreateVolume(ctx, &csi.CreateVolumeRequest{Name: name("v"), VolumeCapabilities: []*csi.VolumeCapability{capability("ext4")},
		AccessibilityRequirements: &csi.TopologyRequirement{Requisite: []*csi.Topology{info.AccessibleTopology}}})
	must(t, err)
	defer (&mounted{c: two, id: r.Volume.VolumeId, path: filepath.Join(work, "none")}).drop()
	if len(r.Volume.AccessibleTopology) != 1 || r.Volume.AccessibleTopology[0].Segments["topology.csi.test.lifeboat.dev/node"] != "n2" {
		t.Errorf("got %v", r.Volume.AccessibleTopology)
	}
	_, err = two.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: r.Volume.VolumeId, NodeId: "n1", VolumeCapability: capability("ext4")})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a volume of n2 on n1: %v", err)
	}
}
