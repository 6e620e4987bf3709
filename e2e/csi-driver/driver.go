package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// driver serves all CSI services of one node.
type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer
	csi.UnimplementedGroupControllerServer
	csi.UnimplementedSnapshotMetadataServer
	options
	pool    pool
	medium  medium
	records records
	faults  faults
	mu      sync.Mutex
}

// openDriver prepares the pool; several instances may do so at the same time.
func openDriver(o options) (*driver, error) {
	d := &driver{options: o, pool: pool{o.pool}, records: records{filepath.Join(o.pool, "records")}, faults: faults{o.faults}}
	d.medium = &images{pool: d.pool}
	if o.trees {
		d.medium = &trees{pool: d.pool}
	}
	for _, dir := range []string{d.pool.snapshots(), d.records.dir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make the pool: %w", err)
		}
	}
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.pool.prepare(); err != nil {
		return nil, err
	}
	return d, save(d.records, recordID(o.nodeID), node{ID: o.nodeID})
}

// lock serialises the changes of all instances that share the pool.
func (d *driver) lock() (unlock func(), err error) {
	d.mu.Lock()
	f, err := os.OpenFile(filepath.Join(d.pool.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			err = errors.Join(err, f.Close())
		}
	}
	if err != nil {
		d.mu.Unlock()
		return nil, status.Errorf(codes.Internal, "lock the pool: %v", err)
	}
	return func() {
		if err := f.Close(); err != nil {
			log.Printf("unlock the pool: %v", err)
		}
		d.mu.Unlock()
	}, nil
}

// topologyKey belongs to the driver's name, so two drivers in one cluster do not mix.
func (d *driver) topologyKey() string { return "topology." + d.driverName + "/node" }

func (d *driver) topologyOf(node string) *csi.Topology {
	return &csi.Topology{Segments: map[string]string{d.topologyKey(): node}}
}

func invalid(format string, a ...any) error {
	return status.Errorf(codes.InvalidArgument, format, a...)
}

func internal(err error) error {
	if _, ok := status.FromError(err); ok { // has a code already
		return err
	}
	return status.Error(codes.Internal, err.Error())
}

// missing tells an absent record from one that cannot be read.
func missing(err error, what, id string) error {
	if errors.Is(err, os.ErrNotExist) {
		return status.Errorf(codes.NotFound, "%s %q does not exist", what, id)
	}
	return status.Errorf(codes.Internal, "read the record of %s %q: %v", what, id, err)
}

func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: d.driverName, VendorVersion: version}, nil
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (d *driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	services := []csi.PluginCapability_Service_Type{csi.PluginCapability_Service_CONTROLLER_SERVICE}
	if d.hasDevices() {
		services = append(services, csi.PluginCapability_Service_GROUP_CONTROLLER_SERVICE, csi.PluginCapability_Service_SNAPSHOT_METADATA_SERVICE)
	}
	if d.topology {
		services = append(services, csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS)
	}
	all := []*csi.PluginCapability{{Type: &csi.PluginCapability_VolumeExpansion_{
		VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE}}}}
	for _, s := range services {
		all = append(all, &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: s}}})
	}
	return &csi.GetPluginCapabilitiesResponse{Capabilities: all}, nil
}
