package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// loopDevices keeps open the devices that this instance attached. They clear themselves when
// nobody has them open any more: a node that dies takes its devices with it, because its mounts
// and this process are all that hold them. Callers hold the driver's lock.
type loopDevices struct{ held map[string]*os.File }

// loopOf finds the device of an image, or gives "". Devices are matched by inode, because the
// path that the kernel remembers depends on the mount namespace that attached it.
func loopOf(image string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		return "", fmt.Errorf("find the loop device of %s: %w", image, err)
	}
	inUse, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return "", err
	}
	for _, p := range inUse {
		dev := "/dev/" + filepath.Base(filepath.Dir(p))
		f, err := os.Open(dev)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENXIO) { // cleared since the listing
			continue
		}
		if err != nil {
			return "", err
		}
		info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
		if err := errors.Join(ignoreENXIO(err), f.Close()); err != nil {
			return "", fmt.Errorf("status of %s: %w", dev, err)
		}
		if err == nil && info.Inode == st.Ino && info.Device == st.Dev {
			return dev, nil
		}
	}
	return "", nil
}

// ENXIO says that a device has no image: it is free.
func ignoreENXIO(err error) error {
	if errors.Is(err, unix.ENXIO) {
		return nil
	}
	return err
}

// attach gives the image's device and sees to it that the device has the image's present size.
func (l *loopDevices) attach(image string) (string, error) {
	dev, err := l.open(image)
	if err != nil {
		return "", fmt.Errorf("attach %s: %w", image, err)
	}
	if err := unix.IoctlSetInt(int(l.held[image].Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		return "", fmt.Errorf("size of %s: %w", dev, err)
	}
	return dev, nil
}

func (l *loopDevices) open(image string) (string, error) {
	if l.held == nil {
		l.held = map[string]*os.File{}
	}
	dev, err := loopOf(image)
	if err != nil {
		return "", err
	}
	if dev != "" {
		if h := l.held[image]; h != nil && h.Name() == dev {
			return dev, nil
		}
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		again, err := loopOf(image)
		if err != nil {
			return "", errors.Join(err, f.Close())
		}
		if again == dev { // was not cleared before it was opened
			l.held[image] = f
			return dev, nil
		}
		if err := f.Close(); err != nil {
			return "", err
		}
	}
	if err := l.detach(image); err != nil {
		return "", err
	}
	f, err := configureFree(image)
	if err != nil {
		return "", err
	}
	l.held[image] = f
	return f.Name(), nil
}

// configureFree attaches the image to a free device; others may be looking for one too.
func configureFree(image string) (*os.File, error) {
	img, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(img.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	copy(config.Info.File_name[:len(config.Info.File_name)-1], filepath.Base(image))
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("get a free loop device: %w", err)
		}
		f, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(f.Fd()), &config)
		if err == nil {
			return f, nil
		}
		if closed := f.Close(); closed != nil || !errors.Is(err, unix.EBUSY) || try == 100 {
			return nil, errors.Join(fmt.Errorf("configure %s: %w", f.Name(), err), closed)
		}
	}
}

// detach lets the device go; the kernel clears it when its mounts are gone too.
func (l *loopDevices) detach(image string) error {
	f := l.held[image]
	if f == nil {
		return nil
	}
	delete(l.held, image)
	return f.Close()
}
